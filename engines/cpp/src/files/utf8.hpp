// UTF-8 and characters.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace fluxdeploy {

// The characters of `text`; nothing where it is not UTF-8: cut off, longer than need be, halves of
// surrogate pairs, or past U+10FFFF.
std::optional<std::u32string> try_decode_utf8(std::string_view text);

// The characters of `text`, with U+FFFD in place of each byte that is part of none.
std::u32string decode_utf8(std::string_view text);

// Characters as UTF-8.
void append_utf8(std::string& text, char32_t code);
std::string encode_utf8(std::u32string_view text);

// Bytes of a character in UTF-8.
std::size_t utf8_size(char32_t code);

}  // namespace fluxdeploy
