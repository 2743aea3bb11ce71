#include "files/words.hpp"

#include <charconv>
#include <cmath>

namespace fluxdeploy {
namespace {

constexpr std::size_t kMaxWords = 300;

bool continues(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

}  // namespace

std::string without_middle(const std::string& text, std::size_t most) {
    if (text.size() <= most) return text;
    std::size_t head = most / 2;
    std::size_t tail = text.size() - most / 2;
    while (head > 0 && continues(text[head])) --head;
    while (tail < text.size() && continues(text[tail])) ++tail;
    return text.substr(0, head) + " ... " + text.substr(tail);
}

std::string shortened(const std::string& text) { return without_middle(text, kMaxWords); }

std::string in_quotes(std::string_view text) {
    const char quote = text.find('\'') != text.npos && text.find('"') == text.npos ? '"' : '\'';
    std::string result(1, quote);
    for (const char byte : text) {
        const auto code = static_cast<unsigned char>(byte);
        if (byte == quote || byte == '\\') {
            result += '\\';
            result += byte;
        } else if (byte == '\n') {
            result += "\\n";
        } else if (byte == '\r') {
            result += "\\r";
        } else if (byte == '\t') {
            result += "\\t";
        } else if (code < 0x20 || code == 0x7F) {
            result += "\\x";
            result += "0123456789abcdef"[code >> 4];
            result += "0123456789abcdef"[code & 15];
        } else {
            result += byte;
        }
    }
    return result + quote;
}

std::string digits(double value) {
    char buffer[40];
    const auto end = std::to_chars(buffer, buffer + sizeof buffer, value).ptr;
    std::string result(buffer, end);
    if (std::isfinite(value) && result.find_first_of(".e") == result.npos) result += ".0";
    return result;
}

std::string rounded(double value) {
    char buffer[40];
    const auto end =
        std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::general, 6).ptr;
    return {buffer, end};
}

}  // namespace fluxdeploy
