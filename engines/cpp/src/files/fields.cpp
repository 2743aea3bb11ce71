#include "files/fields.hpp"

#include <algorithm>

#include "files/words.hpp"

namespace fluxdeploy {
namespace {

std::string shown(const Json& json) {
    const std::string text = json.text();
    return text.size() <= 60 ? text : text.substr(0, 56) + " ...";
}

[[noreturn]] void refuse(const Json& json, const std::string& where, const std::string& wanted) {
    throw FieldError(where, "must be " + wanted + ", not " + shown(json));
}

template <class Kind>
const Kind& as(const Json& json, const std::string& where, const char* wanted) {
    const auto* value = json.as<Kind>();
    if (!value) refuse(json, where, wanted);
    return *value;
}

}  // namespace

FieldError::FieldError(const std::string& where, const std::string& problem)
    : std::runtime_error(where.empty() ? shortened(problem)
                                       : shortened(where) + " " + shortened(problem)) {}

void require(bool condition, const std::string& where, const std::string& problem) {
    if (!condition) throw FieldError(where, problem);
}

std::string join(const std::string& where, std::string_view name) {
    return where.empty() ? std::string(name) : where + "." + std::string(name);
}

std::string at(const std::string& where, std::size_t index) {
    return where + "[" + std::to_string(index) + "]";
}

bool as_boolean(const Json& json, const std::string& where) {
    return as<bool>(json, where, "true or false");
}

std::int64_t as_integer(const Json& json, const std::string& where) {
    return as<std::int64_t>(json, where, "an integer");
}

double as_number(const Json& json, const std::string& where) {
    if (const auto* whole = json.as<std::int64_t>()) return static_cast<double>(*whole);
    return as<double>(json, where, "a number");
}

const std::string& as_text(const Json& json, const std::string& where) {
    return as<std::string>(json, where, "a string");
}

const Json::Array& as_list(const Json& json, const std::string& where) {
    return as<Json::Array>(json, where, "a list");
}

const Json::Object& as_object(const Json& json, const std::string& where) {
    return as<Json::Object>(json, where, "an object");
}

std::optional<double> as_optional_number(const Json& json, const std::string& where) {
    if (json.as<std::nullptr_t>()) return std::nullopt;
    if (!json.as<std::int64_t>() && !json.as<double>()) refuse(json, where, "a number or null");
    return as_number(json, where);
}

std::optional<std::string> as_optional_text(const Json& json, const std::string& where) {
    if (json.as<std::nullptr_t>()) return std::nullopt;
    if (!json.as<std::string>()) refuse(json, where, "a string or null");
    return as_text(json, where);
}

Fields::Fields(const Json& json, std::string where, std::initializer_list<std::string_view> names,
               std::initializer_list<std::string_view> optional)
    : json_(json), where_(std::move(where)) {
    for (const auto& member : as_object(json_, where_)) {
        const bool known =
            std::find(names.begin(), names.end(), member.key) != names.end() ||
            std::find(optional.begin(), optional.end(), member.key) != optional.end();
        require(known, join(where_, member.key), "is not a known field");
    }
    for (const auto name : names) {
        require(json_.find(std::string(name)), join(where_, name), "is missing");
    }
}

const Json& Fields::get(std::string_view name) const {
    const Json* found = json_.find(std::string(name));
    require(found, join(where_, name), "is missing");
    return *found;
}

}  // namespace fluxdeploy
