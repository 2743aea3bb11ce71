// The regular expressions of tokenizers: alternatives of characters, classes and lookaheads.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fluxdeploy {

// A part of a text, and whether it is a match or what stands between matches.
struct Span {
    std::size_t begin;
    std::size_t end;
    bool match;
};

// An expression of Oniguruma's, as far as tokenizers use them: literals, `.`, classes of
// characters, `\s`, `\p{L}` and `\p{N}` with their opposites, groups, lookaheads, and `?`, `*`, `+`
// and `{m,n}` after a character or a class. Alternatives are tried in their order.
class Regex {
public:
    // Raises `Unsupported`, quoting the expression, for anything else, and for what could take time
    // without end or match nothing.
    static Regex compile(const std::string& pattern);

    // An expression that matches this text alone. Raises `Unsupported` for an empty one.
    static Regex literal(const std::string& text);

    // All of `text`, in order: matches from left to right, and what is between them.
    std::vector<Span> spans(std::u32string_view text) const;

    struct Program;

private:
    explicit Regex(std::shared_ptr<const Program> program);

    std::shared_ptr<const Program> program_;
};

}  // namespace fluxdeploy
