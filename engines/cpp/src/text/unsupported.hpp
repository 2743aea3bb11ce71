// What a tokenizer's file asks for and this library does not do.
#pragma once

#include <stdexcept>

namespace fluxdeploy {

// The text is a clause, such as "its normalizer NFKC is not known here", to be completed with the
// file's name.
class Unsupported : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

}  // namespace fluxdeploy
