// All that a `tokenizer.json` does with a text.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "files/json.hpp"
#include "text/added_tokens.hpp"
#include "text/model.hpp"
#include "text/steps.hpp"

namespace fluxdeploy {

class Pipeline {
public:
    // Raises `Unsupported` for a file that is no tokenizer, and for what is not known here.
    explicit Pipeline(const Json& json);

    // The ids of a text alone, without what the file would put around it. Raises `Unsupported`.
    std::vector<std::uint32_t> encode(const std::u32string& text) const;

private:
    Normalizer normalizer_;
    PreTokenizer pre_tokenizer_;
    std::unique_ptr<const Model> model_;
    AddedTokens added_;
};

}  // namespace fluxdeploy
