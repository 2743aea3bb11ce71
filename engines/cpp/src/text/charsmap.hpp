// SentencePiece's map of characters, which T5's tokenizer begins with.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fluxdeploy {

// A double-array trie over bytes, whose values are places in a text of replacements.
class Charsmap {
public:
    // The map in base64, as a tokenizer's file has it. Raises `Unsupported` for what is none.
    explicit Charsmap(const std::string& base64);

    // `text` as the `tokenizers` package maps it: of a grapheme of less than 6 bytes, the
    // replacement of the shortest key that it begins with stands for it all; else each character is
    // mapped by itself. Raises `Unsupported` where the map is broken.
    std::u32string apply(std::u32string_view text) const;

private:
    // Whether `bytes` begins with a key; then `result` is the replacement of the shortest.
    bool find(std::string_view bytes, std::string_view& result) const;
    std::uint32_t unit(std::size_t index) const;

    std::vector<std::uint32_t> units_;
    std::string replacements_;
};

}  // namespace fluxdeploy
