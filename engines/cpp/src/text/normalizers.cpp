#include <memory>

#include "files/utf8.hpp"
#include "text/charsmap.hpp"
#include "text/format.hpp"
#include "text/steps.hpp"
#include "text/unicode.hpp"
#include "text/unsupported.hpp"

namespace fluxdeploy {
namespace {

constexpr int kMaxNesting = 8;
// Characters of a text while it is normalized. Prompts have some hundreds.
constexpr std::size_t kMaxText = std::size_t{1} << 26;

Normalizer read(const Json& json, int nesting);

Normalizer sequence(const Json& json, int nesting) {
    std::vector<Normalizer> steps;
    for (const auto& step : list_member(json, "its normalizer", "normalizers")) {
        steps.push_back(read(step, nesting + 1));
    }
    return [steps](std::u32string text) {
        for (const auto& step : steps) text = step(std::move(text));
        return text;
    };
}

Normalizer replace(const Json& json) {
    const std::u32string content = decode_utf8(text_member(json, "its Replace", "content"));
    const Regex pattern = read_pattern(json, "its Replace");
    return [content, pattern](const std::u32string& text) {
        std::u32string result;
        for (const Span& span : pattern.spans(text)) {
            result += span.match ? content : text.substr(span.begin, span.end - span.begin);
            if (result.size() > kMaxText) throw Unsupported("its Replace makes a text too long");
        }
        return result;
    };
}

Normalizer prepend(const Json& json) {
    const std::u32string content = decode_utf8(text_member(json, "its Prepend", "prepend"));
    return [content](const std::u32string& text) { return text.empty() ? text : content + text; };
}

Normalizer strip(const Json& json) {
    const bool left = flag_member(json, "its Strip", "strip_left");
    const bool right = flag_member(json, "its Strip", "strip_right");
    return [left, right](const std::u32string& text) {
        std::size_t begin = 0;
        std::size_t end = text.size();
        while (left && begin < end && unicode::is_space(text[begin])) ++begin;
        while (right && begin < end && unicode::is_space(text[end - 1])) --end;
        return text.substr(begin, end - begin);
    };
}

Normalizer precompiled(const Json& json) {
    const auto map = std::make_shared<const Charsmap>(
        text_member(json, "its Precompiled", "precompiled_charsmap"));
    return [map](const std::u32string& text) { return map->apply(text); };
}

Normalizer read(const Json& json, int nesting) {
    if (nesting > kMaxNesting) throw Unsupported("its normalizer is nested too deeply");
    if (json.as<std::nullptr_t>()) return [](std::u32string text) { return text; };
    const std::string type = text_member(json, "its normalizer", "type");
    if (type == "Sequence") return sequence(json, nesting);
    if (type == "NFC") return unicode::compose;
    if (type == "NFD") return unicode::decompose;
    if (type == "Lowercase") return unicode::lowercase;
    if (type == "Replace") return replace(json);
    if (type == "Prepend") return prepend(json);
    if (type == "Strip") return strip(json);
    if (type == "Precompiled") return precompiled(json);
    throw Unsupported("its normalizer " + type + " is not known here");
}

}  // namespace

Regex read_pattern(const Json& part, const std::string& what) {
    const Json& pattern = member(part, what, "pattern");
    if (pattern.find("Regex")) return Regex::compile(text_member(pattern, what, "Regex"));
    return Regex::literal(text_member(pattern, what, "String"));
}

Normalizer read_normalizer(const Json& json) { return read(json, 0); }

}  // namespace fluxdeploy
