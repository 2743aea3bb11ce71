// What the `tokenizers` package knows of each character; see
// tests/engines/cpp/make_unicode_tables.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fluxdeploy::unicode {

// Characters from `first` to `last`. All tables are sorted.
struct CharRange {
    char32_t first;
    char32_t last;
};

// Every `step`-th character from `first` to `last`; the lower case of `first` is `lower`, and the
// others' follow as they do. With a step of 0 it is one character, whose lower case is two: `lower`
// and U+0307.
struct LowercaseRun {
    char32_t first;
    char32_t last;
    char32_t step;
    char32_t lower;
};

// A canonical decomposition, one level deep; `second` is 0 where there is none. Without Hangul.
struct Decomposition {
    char32_t whole;
    char32_t first;
    char32_t second;
};

// Two characters that compose to one; sorted by both.
struct Composition {
    char32_t first;
    char32_t second;
    char32_t whole;
};

// Characters from `first` to `last` of one class.
struct ClassRange {
    char32_t first;
    char32_t last;
    std::uint8_t kind;
};

// Classes of `kGraphemes`; those of no range are `other`.
enum class Grapheme : std::uint8_t {
    other,
    cr,
    lf,
    control,
    extend,
    joiner,
    regional,
    prepend,
    spacing,
    hangul_l,
    hangul_v,
    hangul_t,
    hangul_lv,
    hangul_lvt,
    pictograph,
    consonant,  // of Indic scripts
    linker,     // an `extend` that joins two consonants
};

extern const CharRange kLetters[];
extern const std::size_t kLettersSize;
extern const CharRange kNumbers[];
extern const std::size_t kNumbersSize;
extern const CharRange kSpaces[];
extern const std::size_t kSpacesSize;
extern const LowercaseRun kLowercase[];
extern const std::size_t kLowercaseSize;
extern const Decomposition kDecompositions[];
extern const std::size_t kDecompositionsSize;
extern const Composition kCompositions[];
extern const std::size_t kCompositionsSize;
extern const ClassRange kCombining[];
extern const std::size_t kCombiningSize;
extern const ClassRange kGraphemes[];
extern const std::size_t kGraphemesSize;

}  // namespace fluxdeploy::unicode
