// The tokens that are found in a text before the model sees it, such as "</s>".
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "files/json.hpp"
#include "text/model.hpp"
#include "text/prefix_map.hpp"
#include "text/steps.hpp"

namespace fluxdeploy {

// A part of a text: a token, where it has an id, or text between tokens, which is never empty.
struct Part {
    std::u32string text;
    std::optional<std::uint32_t> id;
};

class AddedTokens {
public:
    // The file's `added_tokens`. A token that the model's vocabulary has gets its id; the others
    // are numbered from the vocabulary's end. Raises `Unsupported`.
    AddedTokens(const Json::Array& entries, const Model& model, const Normalizer& normalizer);

    // Tokens are found in the text as it is, and those that say so in the normalized text between;
    // the text in the result is normalized.
    std::vector<Part> split(const std::u32string& text, const Normalizer& normalizer) const;

private:
    struct Token {
        std::u32string pattern;
        bool normalized = false;
        bool takes_left = false;   // with the spaces before it
        bool takes_right = false;  // with the spaces after it
    };

    PrefixMap<char32_t> patterns(bool normalized) const;
    std::vector<Part> split_at(const PrefixMap<char32_t>& patterns, std::u32string_view text) const;

    std::map<std::uint32_t, Token> tokens_;
    PrefixMap<char32_t> plain_;
    PrefixMap<char32_t> normalized_;
};

}  // namespace fluxdeploy
