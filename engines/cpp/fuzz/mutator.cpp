#include "mutator.hpp"

#include <algorithm>
#include <cctype>

namespace fluxdeploy::fuzz {
namespace {

using namespace std::string_view_literals;

// clang-format off
constexpr std::string_view kTokens[] = {
    "99999999999999999999"sv, "-1"sv, "0"sv, "NaN"sv, "-Infinity"sv, "1e999"sv, "true"sv, "null"sv,
    "\""sv, "\\"sv, "[[[[[[[["sv, "{\"a\":{\"a\":"sv, "\\ud800"sv, "\0"sv, "\xff\xfe"sv,
    "\xef\xbb\xbf"sv, "\x1b[2J"sv, "../"sv, "/etc/passwd"sv, ","sv, ":"sv, "\xe2\x80\xae"sv,
    "\xf4\x90\x80\x80"sv, "[^"sv, "(?:"sv, "\\p{L}+*"sv, "{0,9}"sv,
};

constexpr std::string_view kValues[] = {
    "0"sv, "-1"sv, "1"sv, "2"sv, "3"sv, "64"sv, "65536"sv, "16777216"sv, "2147483647"sv,
    "2147483648"sv, "4294967295"sv, "9007199254740993"sv, "9223372036854775807"sv,
    "9223372036854775808"sv, "18446744073709551615"sv, "99999999999999999999"sv,
    "-9223372036854775808"sv, "0.5"sv, "-0.0"sv, "1e-300"sv, "1e300"sv, "1e999"sv, "NaN"sv,
    "true"sv, "false"sv, "null"sv, "\"\""sv, "\" \""sv, "\"\\u0000\""sv, "\"\\u001b[31m\""sv,
    "\"../outside\""sv, "\"/etc/passwd\""sv, "\"link/outside\""sv, "\"a//b\""sv, "\"./a\""sv,
    "\"C:/x\""sv, "\"a\\\\b\""sv, "\"\\u202e\""sv, "\"fluxdeploy.json\""sv, "[]"sv, "{}"sv,
    "[0]"sv, "[null]"sv, "{\"\":0}"sv, "[[[[]]]]"sv, "[-1,1000000000000]"sv, "\"B\""sv, "\"left\""sv,
    "\"(a|b)*\""sv, "\"[a-\""sv, "\"\\\\s+\""sv, "\"Sequence\""sv, "\"Metaspace\""sv,
    "\"ByteLevel\""sv, "\"NFC\""sv, "\"AAAA\""sv,
};
// clang-format on

constexpr std::uint64_t kLengths[] = {0,          1,
                                      7,          1ULL << 16,
                                      1ULL << 24, (1ULL << 31) - 1,
                                      1ULL << 31, (1ULL << 32) - 1,
                                      1ULL << 40, (1ULL << 63) - 1,
                                      1ULL << 63, ~0ULL};

void put_number(std::string& data, std::size_t at, std::uint64_t number, std::size_t size,
                bool big) {
    for (std::size_t i = 0; i < size && at + i < data.size(); ++i) {
        const std::size_t shift = 8 * (big ? size - 1 - i : i);
        data[at + i] = static_cast<char>(number >> shift & 0xFF);
    }
}

std::uint32_t checksum(const std::string& data, std::size_t begin, std::size_t end) {
    std::uint32_t value = ~0U;
    for (std::size_t i = begin; i < end; ++i) {
        value ^= static_cast<unsigned char>(data[i]);
        for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xEDB88320U : 0);
    }
    return ~value;
}

// Give every chunk of a PNG the checksum that it should have.
void repair_png(std::string& data) {
    for (std::size_t at = 8; at + 12 <= data.size();) {
        std::size_t length = 0;
        for (std::size_t i = 0; i < 4; ++i) {
            length = length << 8 | static_cast<unsigned char>(data[at + i]);
        }
        if (length > data.size() - at - 12) return;
        put_number(data, at + 8 + length, checksum(data, at + 4, at + 8 + length), 4, true);
        at += 12 + length;
    }
}

// Where the number, text or word of JSON that holds the byte `at` ends.
std::size_t token_end(const std::string& data, std::size_t at) {
    if (data[at] == '"') {
        std::size_t end = at + 1;
        while (end < data.size() && data[end] != '"') end += data[end] == '\\' ? 2 : 1;
        return std::min(end + 1, data.size());
    }
    std::size_t end = at;
    while (end < data.size() && (std::isalnum(static_cast<unsigned char>(data[end])) ||
                                 data[end] == '.' || data[end] == '-')) {
        ++end;
    }
    return end;
}

}  // namespace

std::size_t Mutator::below(std::size_t count) { return count ? random_() % count : 0; }

std::string Mutator::text(const std::vector<std::string>& seeds) { return damaged(seeds, true); }

std::string Mutator::safetensors(const std::vector<std::string>& seeds) {
    std::string data = damaged(seeds, true);
    const std::size_t end = data.rfind('}');
    if (end != data.npos && end >= 8 && below(3) > 0) put_number(data, 0, end - 7, 8, false);
    return data;
}

std::string Mutator::png(const std::vector<std::string>& seeds) {
    std::string data = damaged(seeds, false);
    if (below(4) > 0) repair_png(data);
    return data;
}

std::string Mutator::damaged(const std::vector<std::string>& seeds, bool json) {
    std::string data = one_of(seeds);
    for (std::size_t i = below(4) + 1; i-- > 0;) {
        if (json && below(2) == 0) {
            damage_value(data);
        } else {
            damage_bytes(data, seeds);
        }
    }
    return data;
}

void Mutator::damage_value(std::string& data) {
    std::size_t at = below(data.size() + 1);
    const auto begins = [](char c) {
        return c == '"' || c == '-' || std::isalnum(static_cast<unsigned char>(c));
    };
    while (at < data.size() && !begins(data[at])) ++at;
    if (at == data.size()) return;
    data.replace(at, token_end(data, at) - at, one_of(kValues));
}

void Mutator::damage_bytes(std::string& data, const std::vector<std::string>& seeds) {
    constexpr std::size_t spans[] = {1, 2, 4, 8, 50, 1000};
    const std::size_t at = below(data.size() + 1);
    const std::size_t span = std::min(one_of(spans), data.size() - at);
    switch (below(9)) {
        case 0:
            if (at < data.size()) data[at] = static_cast<char>(below(256));
            break;
        case 1:
            if (at < data.size()) data[at] = static_cast<char>(data[at] ^ 1 << below(8));
            break;
        case 2:
            data.resize(at);
            break;
        case 3:
            data.erase(at, span);
            break;
        case 4: {
            const std::string part = data.substr(at, span);
            for (std::size_t i = below(20); i-- > 0;) data.insert(at, part);
            break;
        }
        case 5: {
            const std::string& other = one_of(seeds);
            const std::size_t begin = below(other.size() + 1);
            data.replace(at, span, other, begin, span);
            break;
        }
        case 6:
            data.insert(at, one_of(kTokens));
            break;
        case 7: {
            constexpr std::size_t sizes[] = {2, 4, 8};
            put_number(data, below(3) == 0 ? 0 : at, one_of(kLengths), one_of(sizes),
                       below(2) == 0);
            break;
        }
        default:
            data.append(below(2) ? 8 : 5000, '\0');
    }
}

}  // namespace fluxdeploy::fuzz
