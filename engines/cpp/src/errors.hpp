// What the library raises inside; the public header makes codes of it.
#pragma once

#include <stdexcept>
#include <string>

namespace fluxdeploy {

// The kinds of error. `none` is for interfaces that return a code instead of raising.
enum class ErrorCode {
    none = 0,
    usage,               // an argument is outside its allowed range
    bundle,              // a bundle, or a file of it, is missing or broken
    engine,              // an engine could not be opened or run
    numeric,             // a tensor holds NaN or infinity, or an output is past its gate
    cancelled,           // the caller cancelled; no picture was made
    missing_dependency,  // a runtime is needed that is not there
    internal,            // anything else: a picture that cannot be written, memory at its end
};

// An error with a message for the user: what failed, what is allowed, what to do. A message may
// quote a file, which may be one long name or list: then its middle is left out.
class Error : public std::runtime_error {
public:
    Error(ErrorCode code, const std::string& message);

    ErrorCode code() const noexcept { return code_; }

private:
    ErrorCode code_;
};

}  // namespace fluxdeploy
