#include "files/utf8.hpp"

namespace fluxdeploy {
namespace {

struct Decoded {
    char32_t code;
    std::size_t size;  // 0 where the bytes are no character
};

Decoded decode_at(std::string_view text, std::size_t at) {
    const auto lead = static_cast<unsigned char>(text[at]);
    if (lead < 0x80) return {lead, 1};
    const std::size_t size = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (lead < 0xC2 || lead > 0xF4 || at + size > text.size()) return {0, 0};
    char32_t code = lead & (0x7FU >> size);
    for (std::size_t i = 1; i < size; ++i) {
        const auto byte = static_cast<unsigned char>(text[at + i]);
        if ((byte & 0xC0) != 0x80) return {0, 0};
        code = code << 6 | (byte & 0x3F);
    }
    const bool surrogate = code >= 0xD800 && code < 0xE000;
    if (surrogate || code > 0x10FFFF || utf8_size(code) != size) return {0, 0};
    return {code, size};
}

}  // namespace

std::optional<std::u32string> try_decode_utf8(std::string_view text) {
    std::u32string result;
    result.reserve(text.size());
    for (std::size_t at = 0; at < text.size();) {
        const Decoded decoded = decode_at(text, at);
        if (decoded.size == 0) return std::nullopt;
        result += decoded.code;
        at += decoded.size;
    }
    return result;
}

std::u32string decode_utf8(std::string_view text) {
    std::u32string result;
    result.reserve(text.size());
    for (std::size_t at = 0; at < text.size();) {
        const Decoded decoded = decode_at(text, at);
        result += decoded.size ? decoded.code : U'\uFFFD';
        at += decoded.size ? decoded.size : 1;
    }
    return result;
}

void append_utf8(std::string& text, char32_t code) {
    const std::size_t size = utf8_size(code);
    if (size == 1) {
        text += static_cast<char>(code);
        return;
    }
    const unsigned lead = 0xF00U >> size & 0xFFU;
    text += static_cast<char>(lead | code >> (6 * (size - 1)));
    for (std::size_t i = size - 1; i-- > 0;) {
        text += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
    }
}

std::string encode_utf8(std::u32string_view text) {
    std::string result;
    result.reserve(text.size());
    for (const char32_t code : text) append_utf8(result, code);
    return result;
}

std::size_t utf8_size(char32_t code) {
    return code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
}

}  // namespace fluxdeploy
