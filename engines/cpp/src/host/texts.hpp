// What pictures are told in words: prompts for the text encoders, or embeddings in their place.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "files/manifest.hpp"

namespace fluxdeploy {

// A prompt: what CLIP reads of it and what T5 does, or the padded token ids of both.
struct Prompt {
    std::string text;
    std::string text_2;
    bool tokenized = false;
    std::vector<std::int32_t> clip;
    std::vector<std::int32_t> t5;

    bool operator==(const Prompt& other) const;
};

// What a caller says in words on one side: towards it, or away from it. Embeddings are an array of
// a shape that has not been looked at, or nothing.
struct Words {
    std::vector<Prompt> prompts;
    std::vector<std::string> prompts_2;
    std::optional<Floats> prompt_embeds;
    std::optional<Floats> pooled_prompt_embeds;

    bool has_embeddings() const { return prompt_embeds || pooled_prompt_embeds; }
};

// What the encoders would make of P prompts, U of them distinct: T5's [U, S, E] and CLIP's [U, E'];
// `rows` has those of each prompt.
struct Embeddings {
    Floats text;
    Floats pooled;
    std::vector<std::int64_t> rows;
};

// P prompts, or embeddings in their place.
struct Text {
    std::vector<Prompt> prompts;
    std::optional<Embeddings> embeddings;

    std::int64_t size() const {
        return static_cast<std::int64_t>(embeddings ? embeddings->rows.size() : prompts.size());
    }
    // S, where a prompt becomes `length` tokens.
    std::int64_t tokens(std::int64_t length) const {
        return embeddings ? embeddings->text.shape[1] : length;
    }
};

// What to draw, and, where something is said of it, what to steer away from, which has as many
// prompts. Raises `Error` (usage) for what cannot be, or is said twice.
Text read_text(const Manifest& manifest, const Words& words);
std::optional<Text> read_negative_text(const Manifest& manifest, const Words& words,
                                       std::int64_t prompts);

// Raise `Error` (usage) for token ids that are not as many as the encoders take.
void check_ids(const Manifest& manifest, const Text& text, const std::string& name,
               std::int64_t length);

}  // namespace fluxdeploy
