// Prompts to padded token ids, from a `tokenizer.json` and what the manifest says of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "files/bundle.hpp"
#include "files/manifest.hpp"

namespace fluxdeploy {

class Pipeline;  // what the file says: normalizer, pre-tokenizer, model, added tokens

// A tokenizer. It has no state that calls change: threads may share it.
class Tokenizer {
public:
    // The tokenizer in the bytes of a `tokenizer.json`; `name` is "clip" or "t5", and `source`
    // names the file in errors. Raises `Error` (bundle) for a file that is no tokenizer, and, by
    // name, for what this library does not do: never is a prompt tokenized differently.
    static Tokenizer parse(const std::string& name, const std::string& json,
                           const std::string& source, const TokenizerRecord& record);

    // The tokenizer that a bundle's manifest calls `name`. Raises `Error` (bundle) as `parse`
    // does, and where the manifest has none or the file is not the recorded one.
    static Tokenizer read(const Bundle& bundle, const std::string& name);

    // Exactly `length` ids: prefix, the prompt's own ids, cut to what fits, suffix, and padding.
    // Raises `Error` (usage) for a length that the tokenizer cannot fill, and for a prompt that is
    // not UTF-8 text.
    std::vector<std::int32_t> encode(std::string_view prompt, std::int64_t length) const;

    // As above, with the record's `max_length`.
    std::vector<std::int32_t> encode(std::string_view prompt) const;

    // Number of ids of a prompt before cutting, prefix and suffix included.
    std::int64_t count(std::string_view prompt) const;

    const TokenizerRecord& record() const { return record_; }

private:
    Tokenizer(std::string name, std::shared_ptr<const Pipeline> pipeline, TokenizerRecord record);

    std::vector<std::int32_t> tokenize(std::string_view prompt) const;

    std::string name_;
    std::shared_ptr<const Pipeline> pipeline_;
    TokenizerRecord record_;
};

}  // namespace fluxdeploy
