#include "text/unicode.hpp"

#include <algorithm>
#include <utility>

#include "text/unicode_tables.hpp"

namespace fluxdeploy::unicode {
namespace {

constexpr char32_t kDotAbove = 0x307;

// Hangul's syllables follow from their numbers.
constexpr char32_t kSyllable = 0xAC00, kLead = 0x1100, kVowel = 0x1161, kTail = 0x11A7;
constexpr char32_t kLeads = 19, kVowels = 21, kTails = 28;
constexpr char32_t kSyllables = kLeads * kVowels * kTails;

// The row of a sorted table whose `first` to `last` hold `code`; null where there is none.
template <class Row>
const Row* find(const Row* table, std::size_t size, char32_t code) {
    const Row* row = std::lower_bound(table, table + size, code,
                                      [](const Row& each, char32_t c) { return each.last < c; });
    return row != table + size && row->first <= code ? row : nullptr;
}

std::uint8_t combining_class(char32_t code) {
    const auto* row = find(kCombining, kCombiningSize, code);
    return row ? row->kind : 0;
}

bool is_syllable(char32_t code) { return code >= kSyllable && code < kSyllable + kSyllables; }

void append_decomposed(std::u32string& result, char32_t code) {
    if (is_syllable(code)) {
        const char32_t index = code - kSyllable;
        result += kLead + index / (kVowels * kTails);
        result += kVowel + index / kTails % kVowels;
        if (index % kTails) result += kTail + index % kTails;
        return;
    }
    const auto* end = kDecompositions + kDecompositionsSize;
    const auto* row =
        std::lower_bound(kDecompositions, end, code,
                         [](const Decomposition& each, char32_t c) { return each.whole < c; });
    if (row == end || row->whole != code) {
        result += code;
        return;
    }
    // The first part may have parts of its own.
    append_decomposed(result, row->first);
    if (row->second) append_decomposed(result, row->second);
}

// The character that two compose to; 0 where there is none.
char32_t composed(char32_t first, char32_t second) {
    if (first >= kLead && first < kLead + kLeads && second >= kVowel && second < kVowel + kVowels) {
        return kSyllable + ((first - kLead) * kVowels + second - kVowel) * kTails;
    }
    if (is_syllable(first) && (first - kSyllable) % kTails == 0 && second > kTail &&
        second < kTail + kTails) {
        return first + second - kTail;
    }
    const auto* end = kCompositions + kCompositionsSize;
    const auto wanted = std::pair{first, second};
    const auto* row =
        std::lower_bound(kCompositions, end, wanted, [](const Composition& each, const auto& pair) {
            return std::pair{each.first, each.second} < pair;
        });
    return row != end && row->first == first && row->second == second ? row->whole : 0;
}

// What decides where a grapheme ends, of the characters before.
struct GraphemeState {
    Grapheme last;
    bool pictograph;        // a pictograph, with marks after it at most
    bool pictograph_joins;  // that, and a joiner
    bool consonant;         // an Indic consonant, with marks after it at most
    bool consonant_links;   // that, with a linker among the marks
    std::size_t regionals;
};

Grapheme grapheme_class(char32_t code) {
    if (is_syllable(code)) {
        return (code - kSyllable) % kTails ? Grapheme::hangul_lvt : Grapheme::hangul_lv;
    }
    const auto* row = find(kGraphemes, kGraphemesSize, code);
    return row ? static_cast<Grapheme>(row->kind) : Grapheme::other;
}

bool is_control(Grapheme kind) {
    return kind == Grapheme::cr || kind == Grapheme::lf || kind == Grapheme::control;
}

bool joins_hangul(Grapheme left, Grapheme right) {
    switch (left) {
        case Grapheme::hangul_l:
            return right == Grapheme::hangul_l || right == Grapheme::hangul_v ||
                   right == Grapheme::hangul_lv || right == Grapheme::hangul_lvt;
        case Grapheme::hangul_lv:
        case Grapheme::hangul_v:
            return right == Grapheme::hangul_v || right == Grapheme::hangul_t;
        case Grapheme::hangul_lvt:
        case Grapheme::hangul_t:
            return right == Grapheme::hangul_t;
        default:
            return false;
    }
}

// Whether there is no end between what `state` tells of and a character of class `next`: rules GB3
// to GB13 of Unicode's annex 29.
bool joins(const GraphemeState& state, Grapheme next) {
    if (state.last == Grapheme::cr) return next == Grapheme::lf;
    if (is_control(state.last) || is_control(next)) return false;
    if (joins_hangul(state.last, next)) return true;
    if (next == Grapheme::extend || next == Grapheme::linker || next == Grapheme::joiner ||
        next == Grapheme::spacing || state.last == Grapheme::prepend) {
        return true;
    }
    if (next == Grapheme::consonant) return state.consonant_links;
    if (next == Grapheme::pictograph) return state.pictograph_joins;
    return next == Grapheme::regional && state.regionals % 2 == 1;
}

void advance(GraphemeState& state, Grapheme next, char32_t code) {
    constexpr char32_t non_joiner = 0x200C;
    const bool marks = next == Grapheme::extend || next == Grapheme::linker;
    state.pictograph_joins = state.pictograph && next == Grapheme::joiner;
    state.pictograph = next == Grapheme::pictograph || (state.pictograph && marks);
    const bool goes_on =
        state.consonant && (marks || next == Grapheme::joiner) && code != non_joiner;
    state.consonant_links = goes_on && (state.consonant_links || next == Grapheme::linker);
    state.consonant = next == Grapheme::consonant || goes_on;
    state.regionals = next == Grapheme::regional ? state.regionals + 1 : 0;
    state.last = next;
}

}  // namespace

bool is_letter(char32_t code) { return find(kLetters, kLettersSize, code) != nullptr; }

bool is_number(char32_t code) { return find(kNumbers, kNumbersSize, code) != nullptr; }

bool is_space(char32_t code) { return find(kSpaces, kSpacesSize, code) != nullptr; }

std::u32string lowercase(std::u32string_view text) {
    std::u32string result;
    result.reserve(text.size());
    for (const char32_t code : text) {
        const auto* run = find(kLowercase, kLowercaseSize, code);
        if (!run) {
            result += code;
        } else if (run->step == 0) {
            result += run->lower;
            result += kDotAbove;
        } else {
            const char32_t distance = code - run->first;
            result += distance % run->step == 0 ? run->lower + distance : code;
        }
    }
    return result;
}

std::u32string decompose(std::u32string_view text) {
    std::u32string result;
    result.reserve(text.size());
    for (const char32_t code : text) append_decomposed(result, code);
    // Marks on one letter are sorted by their class.
    const auto is_mark = [](char32_t code) { return combining_class(code) != 0; };
    for (auto at = result.begin(); at != result.end();) {
        const auto begin = std::find_if(at, result.end(), is_mark);
        const auto end = std::find_if_not(begin, result.end(), is_mark);
        std::stable_sort(begin, end, [](char32_t left, char32_t right) {
            return combining_class(left) < combining_class(right);
        });
        at = end;
    }
    return result;
}

std::u32string compose(std::u32string_view text) {
    std::u32string result = decompose(text);
    std::size_t kept = 0;
    std::size_t starter = 0;
    bool has_starter = false;
    int last_class = -1;  // of what stands since the starter and did not compose; -1 for nothing
    for (std::size_t i = 0; i < result.size(); ++i) {
        const char32_t code = result[i];
        const int kind = combining_class(code);
        if (has_starter && last_class < kind) {
            if (const char32_t whole = composed(result[starter], code)) {
                result[starter] = whole;
                continue;
            }
        }
        if (kind == 0) {
            starter = kept;
            has_starter = true;
            last_class = -1;
        } else {
            last_class = kind;
        }
        result[kept++] = code;
    }
    result.resize(kept);
    return result;
}

std::size_t grapheme_end(std::u32string_view text, std::size_t start) {
    GraphemeState state{};
    advance(state, grapheme_class(text[start]), text[start]);
    std::size_t at = start + 1;
    for (; at < text.size(); ++at) {
        const Grapheme next = grapheme_class(text[at]);
        if (!joins(state, next)) break;
        advance(state, next, text[at]);
    }
    return at;
}

}  // namespace fluxdeploy::unicode
