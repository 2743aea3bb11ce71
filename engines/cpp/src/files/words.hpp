// Values in the words of error messages, as Python's host writes them.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace fluxdeploy {

// `text` without its middle where it has more than `most` bytes. No character is cut in two.
std::string without_middle(const std::string& text, std::size_t most);

// `without_middle` for a part of a message: 300 bytes.
std::string shortened(const std::string& text);

// `text` in single quotes, with what would move a terminal's cursor escaped.
std::string in_quotes(std::string_view text);

// The shortest digits that are read as `value`, with a point or an exponent: 45.0, 1e-06.
std::string digits(double value);

// `value` in six digits, without zeros at the end: printf's %g, whatever the locale.
std::string rounded(double value);

}  // namespace fluxdeploy
