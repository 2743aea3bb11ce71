#include "arguments.hpp"

#include <charconv>
#include <cmath>
#include <cstdio>

#include "errors.hpp"

namespace fluxdeploy {
namespace {

// Bounds that are whole are written without a fraction.
std::string bound(double value) {
    return value == std::trunc(value) ? std::to_string(static_cast<std::int64_t>(value))
                                      : shown(value);
}

}  // namespace

std::string shown(double value) {
    if (std::isnan(value)) return "nan";
    if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
    // Python's repr: the shortest digits that give the number back, as a fraction where its
    // exponent is from -4 to 15.
    const double size = std::fabs(value);
    const bool fraction = size == 0 || (size >= 1e-4 && size < 1e16);
    char digits[64];
    const auto end =
        std::to_chars(digits, digits + sizeof digits, value,
                      fraction ? std::chars_format::fixed : std::chars_format::scientific);
    std::string text(digits, end.ptr);
    if (fraction && text.find('.') == std::string::npos) text += ".0";
    return text;
}

std::string general(double value) {
    if (std::isnan(value)) return "nan";
    char digits[64];
    std::snprintf(digits, sizeof digits, "%g", value);
    return digits;
}

std::string shown(const std::vector<std::int64_t>& shape) {
    std::string text = "[";
    for (const std::int64_t size : shape) {
        if (text.size() > 1) text += ", ";
        text += std::to_string(size);
    }
    return text + "]";
}

std::int64_t check_integer(const std::string& name, std::int64_t value,
                           std::optional<std::int64_t> least, std::optional<std::int64_t> most,
                           const std::string& unit) {
    if ((least && value < *least) || (most && value > *most)) {
        std::string allowed =
            most ? "from " + std::to_string(*least) + " to " + std::to_string(*most)
                 : "at least " + std::to_string(*least);
        if (!unit.empty()) allowed += " " + unit;
        throw Error(ErrorCode::usage,
                    "`" + name + "` is " + std::to_string(value) + "; it must be " + allowed + ".");
    }
    return value;
}

double check_number(const std::string& name, double value, double least, double most) {
    if (!std::isfinite(value)) {
        throw Error(ErrorCode::usage,
                    "`" + name + "` must be a finite number, not " + shown(value) + ".");
    }
    if (!(least <= value && value <= most)) {
        throw Error(ErrorCode::usage, "`" + name + "` is " + shown(value) + "; it must be from " +
                                          bound(least) + " to " + bound(most) + ".");
    }
    return value;
}

}  // namespace fluxdeploy
