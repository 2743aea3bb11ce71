// Strings with numbers, searched for those that a text begins with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fluxdeploy {

// The time of a search does not depend on how long the strings are, but on how far the text agrees
// with one of them.
template <class Char>
class PrefixMap {
public:
    using String = std::basic_string<Char>;
    using View = std::basic_string_view<Char>;
    using Entry = std::pair<String, std::uint32_t>;

    PrefixMap() = default;

    // Of equal strings the last one counts; empty ones are never found.
    explicit PrefixMap(std::vector<Entry> entries) : entries_(std::move(entries)) {
        const auto before = [](const Entry& a, const Entry& b) { return a.first < b.first; };
        std::stable_sort(entries_.begin(), entries_.end(), before);
        auto kept = entries_.begin();
        for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
            if (kept != entries_.begin() && std::prev(kept)->first == entry->first) --kept;
            if (kept != entry) *kept = std::move(*entry);
            ++kept;
        }
        entries_.erase(kept, entries_.end());
    }

    bool empty() const { return entries_.empty(); }

    // Call `found(length, number)` for each string that `text` begins with, the shortest first.
    template <class Found>
    void search(View text, Found found) const {
        auto first = entries_.begin();
        auto last = entries_.end();
        for (std::size_t depth = 0; depth < text.size(); ++depth) {
            // All from `first` to `last` begin with the first `depth` characters of the text.
            if (first != last && first->first.size() == depth) ++first;
            const auto below = [depth](const Entry& entry, Char c) {
                return Order::lt(entry.first[depth], c);
            };
            const auto above = [depth](Char c, const Entry& entry) {
                return Order::lt(c, entry.first[depth]);
            };
            first = std::lower_bound(first, last, text[depth], below);
            last = std::upper_bound(first, last, text[depth], above);
            if (first == last) return;
            if (first->first.size() == depth + 1) found(depth + 1, first->second);
        }
    }

private:
    using Order = std::char_traits<Char>;

    std::vector<Entry> entries_;
};

}  // namespace fluxdeploy
