// The model of a tokenizer: pieces of text to token ids.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "files/json.hpp"

namespace fluxdeploy {

// No id of a vocabulary is larger: a list of tokens by their ids has to fit into memory.
inline constexpr std::int64_t kMaxId = 1 << 24;

class Model {
public:
    virtual ~Model() = default;

    // Append the ids of a piece of text in UTF-8. Raises `Unsupported` for a character that the
    // vocabulary lacks, where it has no token for unknown ones.
    virtual void encode(const std::string& piece, std::vector<std::uint32_t>& ids) const = 0;

    // The id of a token.
    virtual std::optional<std::uint32_t> find(const std::string& token) const = 0;

    // Tokens of the vocabulary.
    virtual std::size_t size() const = 0;
};

// The file's `model`. Raises `Unsupported`, by name, for one that is not known here.
std::unique_ptr<const Model> read_model(const Json& json);

// The two kinds. Each raises `Unsupported`.
std::unique_ptr<const Model> read_bpe(const Json& json);
std::unique_ptr<const Model> read_unigram(const Json& json);

// The token that stands for a byte where `byte_fallback` is on: "<0x0A>".
std::string byte_token(char byte);

}  // namespace fluxdeploy
