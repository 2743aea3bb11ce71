#include <queue>
#include <string_view>
#include <unordered_map>

#include "files/utf8.hpp"
#include "files/words.hpp"
#include "text/format.hpp"
#include "text/model.hpp"
#include "text/unsupported.hpp"

namespace fluxdeploy {
namespace {

constexpr const char* kWhat = "its model";
constexpr std::size_t kNone = static_cast<std::size_t>(-1);

using Vocabulary = std::unordered_map<std::string, std::uint32_t>;

// What two neighbours become, and how early.
struct Merge {
    std::size_t rank;
    std::uint32_t id;
};

using Merges = std::unordered_map<std::uint64_t, Merge>;

std::uint64_t pair_of(std::uint32_t left, std::uint32_t right) {
    return std::uint64_t{left} << 32 | right;
}

// A token of a word that is not whole yet, between its neighbours.
struct Symbol {
    std::uint32_t id;
    std::size_t before;
    std::size_t after;
    bool gone;
};

// A merge that may be done at a place, unless one of the two was merged meanwhile.
struct Candidate {
    std::size_t rank;
    std::size_t place;
    std::uint32_t id;

    // The queue gives the largest first: that of the least rank, and of these the leftmost.
    bool operator<(const Candidate& other) const {
        return rank != other.rank ? rank > other.rank : place > other.place;
    }
};

// The tokens of one word, merged in the order of the ranks.
class Word {
public:
    Word(const std::vector<std::uint32_t>& ids, const Merges& merges) : merges_(merges) {
        for (std::size_t i = 0; i < ids.size(); ++i) {
            symbols_.push_back(
                {ids[i], i > 0 ? i - 1 : kNone, i + 1 < ids.size() ? i + 1 : kNone, false});
        }
    }

    void merge() {
        for (std::size_t i = 0; i < symbols_.size(); ++i) offer(i);
        while (!queue_.empty()) {
            const Candidate top = queue_.top();
            queue_.pop();
            Symbol& left = symbols_[top.place];
            const Merge* known = left.gone ? nullptr : merge_of(top.place);
            if (!known || known->id != top.id) continue;
            Symbol& right = symbols_[left.after];
            left.id = top.id;
            left.after = right.after;
            right.gone = true;
            if (left.after != kNone) symbols_[left.after].before = top.place;
            if (left.before != kNone) offer(left.before);
            offer(top.place);
        }
    }

    void append_to(std::vector<std::uint32_t>& ids) const {
        for (const Symbol& symbol : symbols_) {
            if (!symbol.gone) ids.push_back(symbol.id);
        }
    }

private:
    // That of the symbol at `place` with the one after it; null where they do not merge.
    const Merge* merge_of(std::size_t place) const {
        const Symbol& left = symbols_[place];
        if (left.after == kNone) return nullptr;
        const auto found = merges_.find(pair_of(left.id, symbols_[left.after].id));
        return found == merges_.end() ? nullptr : &found->second;
    }

    void offer(std::size_t place) {
        if (const Merge* merge = merge_of(place)) queue_.push({merge->rank, place, merge->id});
    }

    const Merges& merges_;
    std::vector<Symbol> symbols_;
    std::priority_queue<Candidate> queue_;
};

class Bpe : public Model {
public:
    explicit Bpe(const Json& json) {
        const Json* dropout = json.find("dropout");
        const auto* rate = dropout ? dropout->as<double>() : nullptr;
        const auto* whole = dropout ? dropout->as<std::int64_t>() : nullptr;
        if (!is_absent(json, "dropout") && !(rate && *rate == 0) && !(whole && *whole == 0)) {
            throw Unsupported("its model drops merges at random");
        }
        unknown_ = optional_text(json, kWhat, "unk_token");
        prefix_ = optional_text(json, kWhat, "continuing_subword_prefix").value_or("");
        suffix_ = optional_text(json, kWhat, "end_of_word_suffix").value_or("");
        fuse_unknown_ = flag_member(json, kWhat, "fuse_unk", false);
        byte_fallback_ = flag_member(json, kWhat, "byte_fallback", false);
        ignore_merges_ = flag_member(json, kWhat, "ignore_merges", false);
        read_vocabulary(member(json, kWhat, "vocab"));
        const auto& merges = list_member(json, kWhat, "merges");
        for (std::size_t rank = 0; rank < merges.size(); ++rank) read_merge(merges[rank], rank);
    }

    void encode(const std::string& piece, std::vector<std::uint32_t>& ids) const override {
        const auto whole = ignore_merges_ ? find(piece) : std::nullopt;
        if (whole) {
            ids.push_back(*whole);
            return;
        }
        Word word(symbols(piece), merges_);
        word.merge();
        word.append_to(ids);
    }

    std::optional<std::uint32_t> find(const std::string& token) const override {
        const auto found = vocabulary_.find(token);
        if (found == vocabulary_.end()) return std::nullopt;
        return found->second;
    }

    std::size_t size() const override { return vocabulary_.size(); }

private:
    void read_vocabulary(const Json& json) {
        const auto* members = json.as<Json::Object>();
        if (!members) throw Unsupported("the vocab of its model is not an object");
        vocabulary_.reserve(members->size());
        for (const auto& entry : *members) {
            const auto* id = entry.value.as<std::int64_t>();
            if (!id || *id < 0 || *id > kMaxId) {
                throw Unsupported("the vocab of its model gives " +
                                  shortened(in_quotes(entry.key)) + " no id from 0 to " +
                                  std::to_string(kMaxId));
            }
            vocabulary_.emplace(entry.key, static_cast<std::uint32_t>(*id));
        }
    }

    std::uint32_t known(const std::string& token) const {
        const auto id = find(token);
        if (!id) {
            throw Unsupported("the vocab of its model lacks " + shortened(in_quotes(token)) +
                              ", which its merges name");
        }
        return *id;
    }

    // A pair of tokens, or both in one text, as older files have it.
    void read_merge(const Json& json, std::size_t rank) {
        std::string left;
        std::string right;
        const auto* pair = json.as<Json::Array>();
        if (pair && pair->size() == 2 && (*pair)[0].as<std::string>() &&
            (*pair)[1].as<std::string>()) {
            left = *(*pair)[0].as<std::string>();
            right = *(*pair)[1].as<std::string>();
        } else if (const auto* text = json.as<std::string>()) {
            const std::size_t space = text->find(' ');
            if (space == text->npos || text->find(' ', space + 1) != text->npos) {
                throw Unsupported("a merge of its model is not two tokens");
            }
            left = text->substr(0, space);
            right = text->substr(space + 1);
        } else {
            throw Unsupported("a merge of its model is not two tokens");
        }
        const std::uint32_t first = known(left);
        const std::uint32_t second = known(right);
        if (right.size() < prefix_.size()) {
            throw Unsupported("a merge of its model lacks the continuing_subword_prefix");
        }
        // Of equal pairs the last one counts.
        merges_[pair_of(first, second)] = {rank, known(left + right.substr(prefix_.size()))};
    }

    // The tokens of single characters, with which merging begins.
    std::vector<std::uint32_t> symbols(const std::string& piece) const {
        std::vector<std::uint32_t> ids;
        const std::u32string codes = decode_utf8(piece);
        // Unknown characters are held back: where they are fused, one token stands for several.
        bool held = false;
        const auto release = [&] {
            if (held) ids.push_back(known_unknown());
            held = false;
        };
        for (std::size_t i = 0; i < codes.size(); ++i) {
            std::string text = i > 0 ? prefix_ : "";
            append_utf8(text, codes[i]);
            if (i + 1 == codes.size()) text += suffix_;
            if (const auto id = find(text)) {
                release();
                ids.push_back(*id);
            } else if (!byte_fallback_ || !append_bytes(text, ids)) {
                if (!unknown_) continue;
                if (!fuse_unknown_) release();
                known_unknown();
                held = true;
            }
        }
        release();
        return ids;
    }

    // Append the tokens of a text's bytes, where the vocabulary has them all.
    bool append_bytes(const std::string& text, std::vector<std::uint32_t>& ids) const {
        std::vector<std::uint32_t> found;
        for (const char byte : text) {
            const auto id = find(byte_token(byte));
            if (!id) return false;
            found.push_back(*id);
        }
        ids.insert(ids.end(), found.begin(), found.end());
        return true;
    }

    std::uint32_t known_unknown() const {
        const auto id = find(*unknown_);
        if (!id) {
            throw Unsupported("its vocabulary lacks its unk_token " +
                              shortened(in_quotes(*unknown_)));
        }
        return *id;
    }

    Vocabulary vocabulary_;
    Merges merges_;
    std::optional<std::string> unknown_;
    std::string prefix_;
    std::string suffix_;
    bool fuse_unknown_ = false;
    bool byte_fallback_ = false;
    bool ignore_merges_ = false;
};

}  // namespace

std::unique_ptr<const Model> read_bpe(const Json& json) { return std::make_unique<Bpe>(json); }

}  // namespace fluxdeploy
