#include "text/added_tokens.hpp"

#include <set>
#include <unordered_map>

#include "files/utf8.hpp"
#include "files/words.hpp"
#include "text/format.hpp"
#include "text/unicode.hpp"
#include "text/unsupported.hpp"

namespace fluxdeploy {
namespace {

constexpr const char* kWhat = "an added token";

}  // namespace

AddedTokens::AddedTokens(const Json::Array& entries, const Model& model,
                         const Normalizer& normalizer) {
    std::unordered_map<std::string, std::uint32_t> ids;
    auto next = static_cast<std::uint32_t>(model.size());
    for (const auto& entry : entries) {
        const std::string content = text_member(entry, kWhat, "content");
        if (flag_member(entry, kWhat, "single_word")) {
            throw Unsupported("its added token " + shortened(in_quotes(content)) +
                              " is a single_word, which is not known here");
        }
        Token token;
        token.pattern = decode_utf8(content);
        token.normalized = flag_member(entry, kWhat, "normalized");
        token.takes_left = flag_member(entry, kWhat, "lstrip");
        token.takes_right = flag_member(entry, kWhat, "rstrip");
        flag_member(entry, kWhat, "special");
        if (content.empty()) continue;
        if (token.normalized) token.pattern = normalizer(token.pattern);
        const auto known = ids.find(content);
        const auto id = known != ids.end() ? known->second : model.find(content);
        ids[content] = id ? *id : next++;
        tokens_[ids[content]] = std::move(token);
    }
    plain_ = patterns(false);
    normalized_ = patterns(true);
}

PrefixMap<char32_t> AddedTokens::patterns(bool normalized) const {
    std::vector<PrefixMap<char32_t>::Entry> entries;
    std::set<std::u32string> seen;
    for (const auto& [id, token] : tokens_) {
        if (token.normalized != normalized) continue;
        if (token.pattern.empty() || !seen.insert(token.pattern).second) {
            throw Unsupported(
                "two of its added tokens, or one and an empty text, are the same "
                "once they are normalized");
        }
        entries.emplace_back(token.pattern, id);
    }
    return PrefixMap<char32_t>(std::move(entries));
}

std::vector<Part> AddedTokens::split(const std::u32string& text,
                                     const Normalizer& normalizer) const {
    std::vector<Part> result;
    for (auto& part : split_at(plain_, text)) {
        if (part.id) {
            result.push_back(std::move(part));
            continue;
        }
        for (auto& inner : split_at(normalized_, normalizer(std::move(part.text)))) {
            result.push_back(std::move(inner));
        }
    }
    return result;
}

std::vector<Part> AddedTokens::split_at(const PrefixMap<char32_t>& patterns,
                                        std::u32string_view text) const {
    std::vector<Part> result;
    std::size_t done = 0;
    const auto flush = [&](std::size_t end) {
        if (done < end) {
            result.push_back({std::u32string(text.substr(done, end - done)), std::nullopt});
        }
    };
    for (std::size_t at = 0; at < text.size() && !patterns.empty();) {
        std::size_t length = 0;
        std::uint32_t id = 0;
        patterns.search(text.substr(at), [&](std::size_t found, std::uint32_t number) {
            length = found;
            id = number;
        });
        if (length == 0) {
            ++at;
            continue;
        }
        const Token& token = tokens_.at(id);
        std::size_t begin = at;
        at += length;
        std::size_t end = at;
        while (token.takes_left && begin > done && unicode::is_space(text[begin - 1])) --begin;
        while (token.takes_right && end < text.size() && unicode::is_space(text[end])) ++end;
        flush(begin);
        result.push_back({{}, id});
        done = end;
    }
    flush(text.size());
    return result;
}

}  // namespace fluxdeploy
