#include "text/charsmap.hpp"

#include <cstring>

#include "files/utf8.hpp"
#include "text/unicode.hpp"
#include "text/unsupported.hpp"

namespace fluxdeploy {
namespace {

constexpr std::size_t kLongGrapheme = 6;
constexpr std::uint32_t kLeaf = 1U << 8;
constexpr std::uint32_t kLabel = 1U << 31 | 0xFF;

[[noreturn]] void broken() { throw Unsupported("its precompiled_charsmap is broken"); }

int sextet(char letter) {
    if (letter >= 'A' && letter <= 'Z') return letter - 'A';
    if (letter >= 'a' && letter <= 'z') return letter - 'a' + 26;
    if (letter >= '0' && letter <= '9') return letter - '0' + 52;
    if (letter == '+') return 62;
    if (letter == '/') return 63;
    broken();
}

std::string decode_base64(const std::string& text) {
    if (text.size() % 4 != 0) broken();
    std::size_t letters = text.size();
    while (letters > 0 && text.size() - letters < 2 && text[letters - 1] == '=') --letters;
    std::string bytes;
    bytes.reserve(text.size() / 4 * 3);
    std::uint32_t bits = 0;
    int count = 0;
    for (std::size_t i = 0; i < letters; ++i) {
        bits = bits << 6 | static_cast<std::uint32_t>(sextet(text[i]));
        count += 6;
        if (count < 8) continue;
        count -= 8;
        bytes += static_cast<char>(bits >> count & 0xFF);
        bits &= (1U << count) - 1;
    }
    if (bits != 0) broken();
    return bytes;
}

std::uint32_t little_endian(const char* bytes) {
    std::uint32_t value = 0;
    for (int i = 3; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(bytes[i]);
    return value;
}

std::size_t offset_of(std::uint32_t unit) { return std::size_t{unit >> 10} << ((unit & 512) >> 6); }

bool continues(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

}  // namespace

Charsmap::Charsmap(const std::string& base64) {
    const std::string bytes = decode_base64(base64);
    if (bytes.size() < 4) broken();
    const std::size_t count = little_endian(bytes.data()) / 4;
    if (count > (bytes.size() - 4) / 4) broken();
    for (std::size_t i = 0; i < count; ++i) {
        units_.push_back(little_endian(bytes.data() + 4 + 4 * i));
    }
    replacements_ = bytes.substr(4 + 4 * count);
    if (!try_decode_utf8(replacements_)) broken();
}

std::u32string Charsmap::apply(std::u32string_view text) const {
    std::u32string result;
    const auto append = [&](std::u32string_view part) {
        std::string_view replacement;
        if (!find(encode_utf8(part), replacement)) return false;
        result += decode_utf8(replacement);
        return true;
    };
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t end = unicode::grapheme_end(text, at);
        const std::u32string_view grapheme = text.substr(at, end - at);
        std::size_t bytes = 0;
        for (const char32_t code : grapheme) bytes += utf8_size(code);
        at = end;
        if (bytes < kLongGrapheme && append(grapheme)) continue;
        for (std::size_t i = 0; i < grapheme.size(); ++i) {
            if (!append(grapheme.substr(i, 1))) result += grapheme[i];
        }
    }
    return result;
}

std::uint32_t Charsmap::unit(std::size_t index) const {
    if (index >= units_.size()) broken();
    return units_[index];
}

bool Charsmap::find(std::string_view bytes, std::string_view& result) const {
    std::size_t node = offset_of(unit(0));
    for (const char byte : bytes) {
        if (byte == '\0') return false;
        const auto label = static_cast<unsigned char>(byte);
        node ^= label;
        const std::uint32_t found = unit(node);
        if ((found & kLabel) != label) return false;
        node ^= offset_of(found);
        if (!(found & kLeaf)) continue;
        const std::size_t begin = unit(node) & 0x7FFFFFFF;
        if (begin > replacements_.size() ||
            (begin < replacements_.size() && continues(replacements_[begin]))) {
            broken();
        }
        const std::size_t end = std::min(replacements_.find('\0', begin), replacements_.size());
        result = std::string_view(replacements_).substr(begin, end - begin);
        return true;
    }
    return false;
}

}  // namespace fluxdeploy
