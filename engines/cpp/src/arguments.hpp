// Arguments of callers, checked in one way and refused in the words of the Python package.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fluxdeploy {

// A number in a message, as Python writes it: 3.0, 1e+16, nan.
std::string shown(double value);

// A double in six digits, as "%g" writes it.
std::string general(double value);

// A shape in a message: [1, 3, 64, 96].
std::string shown(const std::vector<std::int64_t>& shape);

// Raise `Error` (usage) unless `least` <= value <= `most`; a bound that is empty is none. `unit` is
// what the numbers count, in words. Returns the value.
std::int64_t check_integer(const std::string& name, std::int64_t value,
                           std::optional<std::int64_t> least = 1,
                           std::optional<std::int64_t> most = std::nullopt,
                           const std::string& unit = "");

// Raise `Error` (usage) unless the value is finite and `least` <= value <= `most`. Returns it.
double check_number(const std::string& name, double value, double least, double most);

}  // namespace fluxdeploy
