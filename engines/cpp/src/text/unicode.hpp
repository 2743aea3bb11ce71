// Characters as the `tokenizers` package knows them.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace fluxdeploy::unicode {

bool is_letter(char32_t code);  // general category L
bool is_number(char32_t code);  // general category N
bool is_space(char32_t code);   // White_Space

// Each character's lower case, whatever stands around it.
std::u32string lowercase(std::u32string_view text);

// Canonical decomposition (NFD), and that with composition after it (NFC).
std::u32string decompose(std::u32string_view text);
std::u32string compose(std::u32string_view text);

// Where the extended grapheme that begins at `start` ends.
std::size_t grapheme_end(std::u32string_view text, std::size_t start);

}  // namespace fluxdeploy::unicode
