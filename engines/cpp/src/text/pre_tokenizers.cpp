#include <algorithm>
#include <array>

#include "files/utf8.hpp"
#include "text/format.hpp"
#include "text/steps.hpp"
#include "text/unicode.hpp"
#include "text/unsupported.hpp"

namespace fluxdeploy {
namespace {

constexpr int kMaxNesting = 8;

using Pieces = std::vector<std::u32string>;

// What becomes of the matches that a text is split at.
enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

Behavior read_behavior(const std::string& name) {
    if (name == "Removed") return Behavior::removed;
    if (name == "Isolated") return Behavior::isolated;
    if (name == "MergedWithPrevious") return Behavior::merged_with_previous;
    if (name == "MergedWithNext") return Behavior::merged_with_next;
    if (name == "Contiguous") return Behavior::contiguous;
    throw Unsupported("the behavior " + name + " of its Split is not known here");
}

// Whether a span is one piece with the span before it.
bool merges(Behavior behavior, const Span& before, const Span& span) {
    switch (behavior) {
        case Behavior::contiguous:
            return span.match == before.match;
        case Behavior::merged_with_previous:
            return span.match && !before.match;
        case Behavior::merged_with_next:
            return before.match && !span.match;
        default:
            return false;
    }
}

Pieces pieces(const std::u32string& text, const std::vector<Span>& spans, Behavior behavior) {
    Pieces result;
    for (std::size_t i = 0; i < spans.size(); ++i) {
        const std::u32string part = text.substr(spans[i].begin, spans[i].end - spans[i].begin);
        if (behavior == Behavior::removed && spans[i].match) continue;
        if (i > 0 && merges(behavior, spans[i - 1], spans[i])) {
            result.back() += part;
        } else {
            result.push_back(part);
        }
    }
    return result;
}

// Spans of single characters that are to be split at.
template <class Matches>
std::vector<Span> spans_of(const std::u32string& text, Matches matches) {
    std::vector<Span> result;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (matches(text[i])) {
            result.push_back({i, i + 1, true});
        } else if (!result.empty() && !result.back().match) {
            ++result.back().end;
        } else {
            result.push_back({i, i + 1, false});
        }
    }
    return result;
}

PreTokenizer read(const Json& json, int nesting);

PreTokenizer sequence(const Json& json, int nesting) {
    std::vector<PreTokenizer> steps;
    for (const auto& step : list_member(json, "its pre_tokenizer", "pretokenizers")) {
        steps.push_back(read(step, nesting + 1));
    }
    return [steps](std::u32string text) {
        Pieces before{std::move(text)};
        for (const auto& step : steps) {
            Pieces after;
            for (auto& piece : before) {
                for (auto& part : step(std::move(piece))) after.push_back(std::move(part));
            }
            before = std::move(after);
        }
        return before;
    };
}

PreTokenizer split(const Json& json) {
    const Regex pattern = read_pattern(json, "its Split");
    const Behavior behavior = read_behavior(text_member(json, "its Split", "behavior"));
    const bool invert = flag_member(json, "its Split", "invert");
    return [pattern, behavior, invert](const std::u32string& text) {
        auto spans = pattern.spans(text);
        if (invert) {
            for (Span& span : spans) span.match = !span.match;
        }
        return pieces(text, spans, behavior);
    };
}

Pieces split_at_spaces(const std::u32string& text) {
    return pieces(text, spans_of(text, unicode::is_space), Behavior::removed);
}

PreTokenizer metaspace(const Json& json) {
    const std::string what = "its Metaspace";
    const std::u32string mark = decode_utf8(text_member(json, what, "replacement"));
    if (mark.size() != 1)
        throw Unsupported("the replacement of its Metaspace is not one character");
    const std::string scheme = optional_text(json, what, "prepend_scheme").value_or("always");
    if (scheme != "always" && scheme != "never") {
        throw Unsupported("the prepend_scheme " + scheme + " of its Metaspace is not known here");
    }
    if (!flag_member(json, what, "add_prefix_space", true) && scheme != "never") {
        throw Unsupported("the add_prefix_space of its Metaspace contradicts its prepend_scheme");
    }
    const bool prepends = scheme == "always";
    const bool splits = flag_member(json, what, "split", true);
    return [mark, prepends, splits](std::u32string text) {
        std::replace(text.begin(), text.end(), U' ', mark[0]);
        if (prepends && text[0] != mark[0]) text.insert(0, mark);
        if (!splits) return Pieces{text};
        const auto is_mark = [&](char32_t code) { return code == mark[0]; };
        return pieces(text, spans_of(text, is_mark), Behavior::merged_with_next);
    };
}

// A printable character for each byte: itself, or the next one from U+0100 on.
std::array<char32_t, 256> byte_characters() {
    std::array<char32_t, 256> result{};
    char32_t next = 0x100;
    for (char32_t byte = 0; byte < 256; ++byte) {
        const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
        result[byte] = printable ? byte : next++;
    }
    return result;
}

std::u32string as_bytes(const std::u32string& text) {
    static const auto characters = byte_characters();
    std::u32string result;
    for (const char byte : encode_utf8(text)) {
        result += characters[static_cast<unsigned char>(byte)];
    }
    return result;
}

PreTokenizer byte_level(const Json& json) {
    static const Regex words = Regex::compile(
        R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)");
    const bool prefix = flag_member(json, "its ByteLevel", "add_prefix_space");
    const bool splits = flag_member(json, "its ByteLevel", "use_regex", true);
    return [prefix, splits](std::u32string text) {
        if (prefix && text[0] != ' ') text.insert(0, 1, U' ');
        Pieces result = splits ? pieces(text, words.spans(text), Behavior::isolated) : Pieces{text};
        for (auto& piece : result) piece = as_bytes(piece);
        return result;
    };
}

PreTokenizer read(const Json& json, int nesting) {
    if (nesting > kMaxNesting) throw Unsupported("its pre_tokenizer is nested too deeply");
    if (json.as<std::nullptr_t>())
        return [](std::u32string text) { return Pieces{std::move(text)}; };
    const std::string type = text_member(json, "its pre_tokenizer", "type");
    if (type == "Sequence") return sequence(json, nesting);
    if (type == "Split") return split(json);
    if (type == "WhitespaceSplit") return split_at_spaces;
    if (type == "Metaspace") return metaspace(json);
    if (type == "ByteLevel") return byte_level(json);
    throw Unsupported("its pre_tokenizer " + type + " is not known here");
}

}  // namespace

PreTokenizer read_pre_tokenizer(const Json& json) { return read(json, 0); }

}  // namespace fluxdeploy
