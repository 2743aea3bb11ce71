#include <limits>

#include "text/format.hpp"
#include "text/model.hpp"
#include "text/prefix_map.hpp"
#include "text/unsupported.hpp"

namespace fluxdeploy {
namespace {

constexpr const char* kWhat = "its model";
// What a character that no token has costs, below the least score of all tokens.
constexpr double kUnknownPenalty = 10;

// The best way to the end of a text's first bytes: its score, and its last token.
struct Node {
    double score = 0;
    std::size_t start = 0;
    std::uint32_t id = 0;
    bool reached = false;
};

std::size_t character_size(char lead) {
    const auto byte = static_cast<unsigned char>(lead);
    return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

class Unigram : public Model {
public:
    explicit Unigram(const Json& json) {
        byte_fallback_ = flag_member(json, kWhat, "byte_fallback", false);
        std::vector<PrefixMap<char>::Entry> pieces;
        for (const auto& entry : list_member(json, kWhat, "vocab")) {
            const auto* pair = entry.as<Json::Array>();
            const bool two = pair && pair->size() == 2;
            const auto* piece = two ? (*pair)[0].as<std::string>() : nullptr;
            if (!piece) throw Unsupported("the vocab of its model is not a list of pairs");
            scores_.push_back(read_score((*pair)[1]));
            pieces.emplace_back(*piece, static_cast<std::uint32_t>(scores_.size() - 1));
            least_ = std::min(least_, scores_.back());
        }
        if (scores_.size() > kMaxId) throw Unsupported("the vocab of its model is too large");
        pieces_ = PrefixMap<char>(std::move(pieces));
        if (const auto id = optional_integer(json, kWhat, "unk_id")) {
            if (*id < 0 || static_cast<std::size_t>(*id) >= scores_.size()) {
                throw Unsupported("the unk_id of its model is not in its vocab");
            }
            unknown_ = static_cast<std::uint32_t>(*id);
        }
    }

    void encode(const std::string& piece, std::vector<std::uint32_t>& ids) const override {
        const auto nodes = best_paths(piece);
        // From the end to the start. Unknown characters in a row are one token.
        std::vector<std::pair<std::size_t, std::size_t>> parts;
        bool fuses = false;
        for (std::size_t end = piece.size(); end > 0; end = nodes[end].start) {
            const bool unknown = unknown_ && nodes[end].id == *unknown_;
            if (unknown && fuses) {
                parts.back().first = nodes[end].start;
            } else {
                parts.emplace_back(nodes[end].start, end);
            }
            fuses = unknown;
        }
        for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
            append(piece.substr(part->first, part->second - part->first), ids);
        }
    }

    std::optional<std::uint32_t> find(const std::string& token) const override {
        std::optional<std::uint32_t> id;
        pieces_.search(token, [&](std::size_t length, std::uint32_t number) {
            if (length == token.size()) id = number;
        });
        return id;
    }

    std::size_t size() const override { return scores_.size(); }

private:
    static double read_score(const Json& json) {
        if (const auto* whole = json.as<std::int64_t>()) return static_cast<double>(*whole);
        if (const auto* score = json.as<double>()) return *score;
        throw Unsupported("the vocab of its model is not a list of pairs");
    }

    std::vector<Node> best_paths(const std::string& piece) const {
        std::vector<Node> nodes(piece.size() + 1);
        const auto offer = [&](std::size_t start, std::size_t length, double score,
                               std::uint32_t id) {
            Node& node = nodes[start + length];
            const double sum = score + nodes[start].score;
            if (!node.reached || sum > node.score) node = {sum, start, id, true};
        };
        for (std::size_t start = 0; start < piece.size();) {
            const std::size_t size = character_size(piece[start]);
            bool has_single = false;
            const auto rest = std::string_view(piece).substr(start);
            pieces_.search(rest, [&](std::size_t length, std::uint32_t id) {
                offer(start, length, scores_[id], id);
                has_single = has_single || length == size;
            });
            if (!has_single) offer(start, size, least_ - kUnknownPenalty, required_unknown());
            start += size;
        }
        return nodes;
    }

    // Append the id of a part; of one that is no token, those of its bytes, or the unknown one.
    void append(const std::string& part, std::vector<std::uint32_t>& ids) const {
        if (const auto id = find(part)) {
            ids.push_back(*id);
            return;
        }
        std::vector<std::uint32_t> bytes;
        for (const char byte : byte_fallback_ ? part : "") {
            const auto id = find(byte_token(byte));
            if (!id) break;
            bytes.push_back(*id);
        }
        if (bytes.size() == part.size()) {
            ids.insert(ids.end(), bytes.begin(), bytes.end());
        } else {
            ids.push_back(required_unknown());
        }
    }

    std::uint32_t required_unknown() const {
        if (!unknown_) {
            throw Unsupported("it has a character that the vocabulary lacks, and no unk_id");
        }
        return *unknown_;
    }

    PrefixMap<char> pieces_;
    std::vector<double> scores_;
    double least_ = std::numeric_limits<double>::infinity();
    std::optional<std::uint32_t> unknown_;
    bool byte_fallback_ = false;
};

}  // namespace

std::unique_ptr<const Model> read_unigram(const Json& json) {
    return std::make_unique<Unigram>(json);
}

}  // namespace fluxdeploy
