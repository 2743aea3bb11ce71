// The fields of JSON objects, typed: nothing is guessed, and an error names the place in the text.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "files/json.hpp"

namespace fluxdeploy {

// A field holds what it must not; the text has its place, such as `files[0].path`.
class FieldError : public std::runtime_error {
public:
    FieldError(const std::string& where, const std::string& problem);
};

// Raise `FieldError` unless `condition` holds.
void require(bool condition, const std::string& where, const std::string& problem);

// The place of the field `name` in the object at `where`.
std::string join(const std::string& where, std::string_view name);

// The place of an entry of the list at `where`.
std::string at(const std::string& where, std::size_t index);

// Values of one type. Each raises `FieldError` for another, naming it.
bool as_boolean(const Json& json, const std::string& where);
std::int64_t as_integer(const Json& json, const std::string& where);
double as_number(const Json& json, const std::string& where);  // a whole number counts
const std::string& as_text(const Json& json, const std::string& where);
const Json::Array& as_list(const Json& json, const std::string& where);
const Json::Object& as_object(const Json& json, const std::string& where);
std::optional<double> as_optional_number(const Json& json, const std::string& where);
std::optional<std::string> as_optional_text(const Json& json, const std::string& where);

// An object with exactly the fields `names`, and such of `optional` as it has: unknown and missing
// ones are refused.
class Fields {
public:
    Fields(const Json& json, std::string where, std::initializer_list<std::string_view> names,
           std::initializer_list<std::string_view> optional = {});

    bool has(std::string_view name) const { return json_.find(std::string(name)) != nullptr; }

    const Json& get(std::string_view name) const;
    std::string where(std::string_view name) const { return join(where_, name); }

    bool boolean(std::string_view name) const { return as_boolean(get(name), where(name)); }
    std::int64_t integer(std::string_view name) const { return as_integer(get(name), where(name)); }
    double number(std::string_view name) const { return as_number(get(name), where(name)); }
    std::string text(std::string_view name) const { return as_text(get(name), where(name)); }
    std::optional<double> optional_number(std::string_view name) const {
        return as_optional_number(get(name), where(name));
    }

    std::optional<std::string> optional_text(std::string_view name) const {
        return as_optional_text(get(name), where(name));
    }

    // The entries of a list, each read by `read(json, where)`.
    template <class Read>
    auto list(std::string_view name, Read read) const {
        std::vector<decltype(read(std::declval<const Json&>(), std::string()))> result;
        const auto& entries = as_list(get(name), where(name));
        for (std::size_t i = 0; i < entries.size(); ++i) {
            result.push_back(read(entries[i], at(where(name), i)));
        }
        return result;
    }

    // The members of an object whose keys are free, each read by `read(json, where)`.
    template <class Read>
    auto mapping(std::string_view name, Read read) const {
        std::map<std::string, decltype(read(std::declval<const Json&>(), std::string()))> result;
        for (const auto& member : as_object(get(name), where(name))) {
            result.emplace(member.key, read(member.value, join(where(name), member.key)));
        }
        return result;
    }

private:
    const Json& json_;
    std::string where_;
};

}  // namespace fluxdeploy
