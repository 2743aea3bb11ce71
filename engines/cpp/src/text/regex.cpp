#include "text/regex.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>

#include "files/utf8.hpp"
#include "files/words.hpp"
#include "text/unicode.hpp"
#include "text/unsupported.hpp"

namespace fluxdeploy {
namespace {

constexpr std::size_t kEndless = std::numeric_limits<std::size_t>::max();
constexpr int kMaxNesting = 8;

// A set of characters: ranges and classes, or all others.
class CharacterSet {
public:
    using Class = bool (*)(char32_t);

    void add(char32_t first, char32_t last) { ranges_.push_back({first, last}); }
    void add(Class kind, bool opposite) { classes_.push_back({kind, opposite}); }
    void negate() { negated_ = true; }

    // To be called when all is added: most characters of most texts are ASCII.
    void finish() {
        for (char32_t code = 0; code < ascii_.size(); ++code) ascii_[code] = search(code);
    }

    bool has(char32_t code) const { return code < ascii_.size() ? ascii_[code] : search(code); }

private:
    bool search(char32_t code) const {
        const bool found = std::any_of(ranges_.begin(), ranges_.end(),
                                       [code](const auto& range) {
                                           return range.first <= code && code <= range.second;
                                       }) ||
                           std::any_of(classes_.begin(), classes_.end(), [code](const auto& kind) {
                               return kind.first(code) != kind.second;
                           });
        return found != negated_;
    }

    std::vector<std::pair<char32_t, char32_t>> ranges_;
    std::vector<std::pair<Class, bool>> classes_;
    bool negated_ = false;
    std::array<bool, 128> ascii_{};
};

struct Item;
using Alternative = std::vector<Item>;

// A part of an alternative: characters of a set, a group, or a look at what follows.
struct Item {
    enum class Kind { set, group, ahead, not_ahead };

    Kind kind = Kind::set;
    CharacterSet set;
    std::size_t least = 1;
    std::size_t most = 1;
    std::vector<Alternative> alternatives;
};

// The least number of characters that some alternative matches.
std::size_t least_length(const std::vector<Alternative>& alternatives) {
    std::size_t least = kEndless;
    for (const auto& alternative : alternatives) {
        std::size_t length = 0;
        for (const auto& item : alternative) {
            if (item.kind == Item::Kind::set) length += item.least;
            if (item.kind == Item::Kind::group) length += least_length(item.alternatives);
        }
        least = std::min(least, length);
    }
    return least;
}

class Parser {
public:
    explicit Parser(const std::string& pattern) : pattern_(pattern), text_(decode_utf8(pattern)) {}

    std::vector<Alternative> parse() {
        auto result = alternatives();
        if (at_ < text_.size()) refuse("closes a group that is not open");
        if (least_length(result) == 0) refuse("matches nothing");
        return result;
    }

private:
    [[noreturn]] void refuse(const std::string& why) const {
        throw Unsupported("its expression " + shortened(in_quotes(pattern_)) + " " + why);
    }

    bool at(char32_t code) const { return at_ < text_.size() && text_[at_] == code; }

    bool skip(char32_t code) {
        if (!at(code)) return false;
        ++at_;
        return true;
    }

    char32_t next() {
        if (at_ == text_.size()) refuse("is cut off");
        return text_[at_++];
    }

    std::vector<Alternative> alternatives() {
        if (++nesting_ > kMaxNesting) refuse("is nested too deeply");
        std::vector<Alternative> result;
        do {
            result.push_back(alternative());
        } while (skip('|'));
        --nesting_;
        return result;
    }

    Alternative alternative() {
        Alternative items;
        int repeats = 0;
        while (at_ < text_.size() && !at('|') && !at(')')) {
            items.push_back(item());
            const Item& last = items.back();
            if (last.most - last.least > 1 && ++repeats > 1) {
                refuse("repeats twice in one alternative, which can take time without end");
            }
        }
        return items;
    }

    Item item() {
        Item item = atom();
        const std::size_t before = at_;
        quantify(item);
        if (at_ == before) return item;
        if (item.kind != Item::Kind::set) {
            refuse("repeats a group, which can take time without end");
        }
        if (at('?') || at('*') || at('+') || at('{')) {
            refuse("has a repetition of a kind that is not known here");
        }
        return item;
    }

    void quantify(Item& item) {
        if (skip('?')) {
            item.least = 0;
        } else if (skip('*')) {
            item.least = 0;
            item.most = kEndless;
        } else if (skip('+')) {
            item.most = kEndless;
        } else if (skip('{')) {
            item.least = at(',') ? 0 : number();
            item.most = item.least;
            if (skip(',')) item.most = at('}') ? kEndless : number();
            if (!skip('}') || item.least > item.most || item.most == 0) {
                refuse("has a repetition that cannot be read");
            }
        }
    }

    std::size_t number() {
        std::size_t value = 0;
        const std::size_t before = at_;
        while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
            value = 10 * value + (text_[at_++] - '0');
            if (value > 1000) refuse("repeats more than 1000 times");
        }
        if (at_ == before) refuse("has a repetition that cannot be read");
        return value;
    }

    Item atom() {
        Item item;
        const char32_t code = next();
        switch (code) {
            case '(':
                group(item);
                return item;
            case '[':
                bracket(item.set);
                break;
            case '\\':
                escape(item.set);
                break;
            case '.':
                item.set.add('\n', '\n');
                item.set.negate();
                break;
            case '?':
            case '*':
            case '+':
            case '{':
                refuse("repeats nothing");
            case '^':
            case '$':
                refuse("has an anchor, which is not known here");
            default:
                item.set.add(code, code);
        }
        item.set.finish();
        return item;
    }

    void group(Item& item) {
        item.kind = Item::Kind::group;
        if (skip('?')) {
            const char32_t kind = next();
            if (kind == '=') {
                item.kind = Item::Kind::ahead;
            } else if (kind == '!') {
                item.kind = Item::Kind::not_ahead;
            } else if (kind != ':') {
                refuse("has a group of a kind that is not known here");
            }
        }
        item.alternatives = alternatives();
        if (!skip(')')) refuse("is cut off");
    }

    // A class in brackets, whose first one is read.
    void bracket(CharacterSet& set) {
        const bool negated = skip('^');
        if (at(']')) refuse("has an empty class");
        while (!skip(']')) {
            const char32_t code = next();
            if (code == '[' || (code == '&' && at('&'))) {
                refuse("has a class of a kind that is not known here");
            }
            char32_t first = code;
            if (code == '\\' && !escaped_character(first)) {
                escape(set);
                continue;
            }
            const bool range = at('-') && at_ + 1 < text_.size() && text_[at_ + 1] != ']';
            if (!range) {
                set.add(first, first);
                continue;
            }
            ++at_;
            char32_t last = next();
            if (last == '[' || (last == '\\' && !escaped_character(last)) || last < first) {
                refuse("has a range that cannot be read");
            }
            set.add(first, last);
        }
        if (negated) set.negate();
    }

    // Read what follows a backslash, where that is one character.
    bool escaped_character(char32_t& code) {
        if (at_ == text_.size()) refuse("is cut off");
        const char32_t letter = text_[at_];
        const bool word = (letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z') ||
                          (letter >= '0' && letter <= '9') || letter >= 0x80;
        if (word && letter != 'n' && letter != 'r' && letter != 't') return false;
        code = letter == 'n' ? '\n' : letter == 'r' ? '\r' : letter == 't' ? '\t' : letter;
        ++at_;
        return true;
    }

    // What follows a backslash.
    void escape(CharacterSet& set) {
        char32_t code = 0;
        if (escaped_character(code)) {
            set.add(code, code);
            return;
        }
        const char32_t letter = next();
        const bool property = letter == 'p' || letter == 'P';
        const char32_t kind = property ? category() : 0;
        if (letter == 's' || letter == 'S') {
            set.add(unicode::is_space, letter == 'S');
        } else if (kind == 'L') {
            set.add(unicode::is_letter, letter == 'P');
        } else if (kind == 'N') {
            set.add(unicode::is_number, letter == 'P');
        } else {
            refuse("has a class of a kind that is not known here");
        }
    }

    // The one letter in `{L}`; 0 for more.
    char32_t category() {
        if (!skip('{')) return 0;
        const char32_t letter = next();
        if (!skip('}')) refuse("has a class of a kind that is not known here");
        return letter;
    }

    const std::string& pattern_;
    std::u32string text_;
    std::size_t at_ = 0;
    int nesting_ = 0;
};

// What is to be matched after an alternative's end.
struct Rest {
    const Alternative* items;
    std::size_t index;
    const Rest* rest;
};

// Backtracking, whose depth is bounded by the expression and not by the text.
class Matcher {
public:
    explicit Matcher(std::u32string_view text) : text_(text) {}

    // Where the first alternative that matches at `at` ends.
    std::optional<std::size_t> any(const std::vector<Alternative>& alternatives, std::size_t at,
                                   const Rest* rest) const {
        for (const auto& alternative : alternatives) {
            if (const auto end = match({&alternative, 0, rest}, at)) return end;
        }
        return std::nullopt;
    }

private:
    std::optional<std::size_t> match(Rest rest, std::size_t at) const {
        while (rest.index == rest.items->size()) {
            if (!rest.rest) return at;
            rest = *rest.rest;
        }
        const Item& item = (*rest.items)[rest.index++];
        if (item.kind == Item::Kind::group) return any(item.alternatives, at, &rest);
        if (item.kind != Item::Kind::set) {
            const bool follows = any(item.alternatives, at, nullptr).has_value();
            if (follows != (item.kind == Item::Kind::ahead)) return std::nullopt;
            return match(rest, at);
        }
        std::size_t count = 0;
        const std::size_t most = std::min(item.most, text_.size() - at);
        while (count < most && item.set.has(text_[at + count])) ++count;
        for (; count + 1 > item.least; --count) {
            if (const auto end = match(rest, at + count)) return end;
            if (count == 0) break;
        }
        return std::nullopt;
    }

    std::u32string_view text_;
};

}  // namespace

struct Regex::Program {
    std::vector<Alternative> alternatives;
};

Regex::Regex(std::shared_ptr<const Program> program) : program_(std::move(program)) {}

Regex Regex::compile(const std::string& pattern) {
    return Regex(std::make_shared<const Program>(Program{Parser(pattern).parse()}));
}

Regex Regex::literal(const std::string& text) {
    if (text.empty()) throw Unsupported("it replaces an empty text");
    Alternative items;
    for (const char32_t code : decode_utf8(text)) {
        items.emplace_back();
        items.back().set.add(code, code);
        items.back().set.finish();
    }
    return Regex(std::make_shared<const Program>(Program{{std::move(items)}}));
}

std::vector<Span> Regex::spans(std::u32string_view text) const {
    std::vector<Span> result;
    const Matcher matcher(text);
    std::size_t done = 0;
    for (std::size_t at = 0; at < text.size();) {
        const auto end = matcher.any(program_->alternatives, at, nullptr);
        if (!end) {
            ++at;
            continue;
        }
        if (done < at) result.push_back({done, at, false});
        result.push_back({at, *end, true});
        at = done = *end;
    }
    if (done < text.size()) result.push_back({done, text.size(), false});
    return result;
}

}  // namespace fluxdeploy
