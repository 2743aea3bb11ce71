// Strict JSON: what Python's host reads with `load_strict`, and nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

namespace fluxdeploy {

struct JsonMember;

// A JSON value. An integer is a number without fraction and exponent that 64 bits hold. Members of
// an object are in the text's order.
struct Json {
    using Array = std::vector<Json>;
    using Object = std::vector<JsonMember>;

    std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object> value;

    template <class Kind>
    const Kind* as() const {
        return std::get_if<Kind>(&value);
    }

    // The member `key` of an object; null where it has none, or this is no object.
    const Json* find(const std::string& key) const;

    // One line of ASCII, as Python's `json.dumps` writes it.
    std::string text() const;
};

struct JsonMember {
    std::string key;
    Json value;
};

// What is wrong with a text, to be completed with the file's name.
class JsonError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// The value that `text` holds, of at most `most_values` values. Raises `JsonError` for anything
// that is not JSON, for NaN, infinities and numbers past a double's range, for integers of more
// than 20 digits, for duplicate keys, for strings that are not Unicode text, and for nesting too
// deep to read.
Json parse_json(const std::string& text, std::size_t most_values);

}  // namespace fluxdeploy
