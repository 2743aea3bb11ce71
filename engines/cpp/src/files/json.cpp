#include "files/json.hpp"

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <string_view>

#include "files/utf8.hpp"
#include "files/words.hpp"

namespace fluxdeploy {
namespace {

constexpr std::size_t kMaxDepth = 256;
constexpr std::size_t kMaxDigits = 20;

// Whether a number is written as an integer.
bool is_whole(std::string_view digits) { return digits.find_first_of(".eE") == digits.npos; }

// Builds a `Json` from nlohmann's events, which checks what that reader is lenient about.
class Builder : public nlohmann::json_sax<nlohmann::json> {
public:
    explicit Builder(std::size_t most_values) : most_values_(most_values) {}

    Json take() { return std::move(root_); }

    bool null() override { return add(Json{nullptr}); }
    bool boolean(bool value) override { return add(Json{value}); }
    bool number_integer(number_integer_t value) override { return add(Json{value}); }

    bool number_unsigned(number_unsigned_t value) override {
        if (value <= INT64_MAX) return add(Json{static_cast<std::int64_t>(value)});
        return add(Json{static_cast<double>(value)});
    }

    bool number_float(number_float_t value, const string_t& digits) override {
        if (is_whole(digits) && digits.size() > kMaxDigits) {
            throw JsonError("the number " + digits.substr(0, 8) + "... has " +
                            std::to_string(digits.size()) + " digits");
        }
        return add(Json{value});
    }

    bool string(string_t& value) override { return add(Json{std::move(value)}); }
    bool binary(binary_t&) override { return false; }

    bool start_object(std::size_t) override { return open(Json{Json::Object{}}); }
    bool start_array(std::size_t) override { return open(Json{Json::Array{}}); }

    bool key(string_t& value) override {
        keys_.push_back(std::move(value));
        return true;
    }

    bool end_object() override {
        refuse_duplicates(std::get<Json::Object>(open_.back().value));
        return close();
    }

    bool end_array() override { return close(); }

    bool parse_error(std::size_t position, const std::string&,
                     const nlohmann::detail::exception& error) override {
        // 406 is nlohmann's number for a number past a double's range.
        if (error.id == 406) throw JsonError("a number is too large");
        throw JsonError("it cannot be read at byte " + std::to_string(position));
    }

private:
    bool add(Json value) {
        if (++values_ > most_values_) {
            throw JsonError("it has more than the " + std::to_string(most_values_) +
                            " values that are allowed");
        }
        if (open_.empty()) {
            root_ = std::move(value);
        } else if (auto* array = std::get_if<Json::Array>(&open_.back().value)) {
            array->push_back(std::move(value));
        } else {
            auto& object = std::get<Json::Object>(open_.back().value);
            object.push_back({std::move(keys_.back()), std::move(value)});
            keys_.pop_back();
        }
        return true;
    }

    bool open(Json value) {
        if (open_.size() >= kMaxDepth) throw JsonError("it is nested too deeply");
        open_.push_back(std::move(value));
        return true;
    }

    bool close() {
        Json value = std::move(open_.back());
        open_.pop_back();
        return add(std::move(value));
    }

    static void refuse_duplicates(const Json::Object& members) {
        std::vector<std::string_view> keys;
        keys.reserve(members.size());
        for (const auto& member : members) keys.push_back(member.key);
        std::sort(keys.begin(), keys.end());
        const auto twice = std::adjacent_find(keys.begin(), keys.end());
        if (twice == keys.end()) return;
        throw JsonError("the key " + shortened(in_quotes(*twice)) + " occurs twice");
    }

    std::size_t most_values_;
    std::size_t values_ = 0;
    Json root_{nullptr};
    std::vector<Json> open_;
    std::vector<std::string> keys_;  // of the open objects' members that have no value yet
};

void append_escaped(std::string& result, char32_t unit) {
    result += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) result += "0123456789abcdef"[unit >> shift & 15];
}

void append_string(std::string& result, const std::string& text) {
    result += '"';
    for (const char32_t code : decode_utf8(text)) {
        if (code == '"' || code == '\\') {
            result += '\\';
            result += static_cast<char>(code);
        } else if (code == '\n') {
            result += "\\n";
        } else if (code == '\r') {
            result += "\\r";
        } else if (code == '\t') {
            result += "\\t";
        } else if (code >= 0x20 && code < 0x7F) {
            result += static_cast<char>(code);
        } else if (code < 0x10000) {
            append_escaped(result, code);
        } else {
            append_escaped(result, 0xD800 + ((code - 0x10000) >> 10));
            append_escaped(result, 0xDC00 + ((code - 0x10000) & 0x3FF));
        }
    }
    result += '"';
}

void append(std::string& result, const Json& json) {
    if (json.as<std::nullptr_t>()) {
        result += "null";
    } else if (const auto* flag = json.as<bool>()) {
        result += *flag ? "true" : "false";
    } else if (const auto* whole = json.as<std::int64_t>()) {
        result += std::to_string(*whole);
    } else if (const auto* number = json.as<double>()) {
        result += digits(*number);
    } else if (const auto* text = json.as<std::string>()) {
        append_string(result, *text);
    } else if (const auto* array = json.as<Json::Array>()) {
        result += '[';
        for (std::size_t i = 0; i < array->size(); ++i) {
            if (i > 0) result += ", ";
            append(result, (*array)[i]);
        }
        result += ']';
    } else {
        const auto& object = std::get<Json::Object>(json.value);
        result += '{';
        for (std::size_t i = 0; i < object.size(); ++i) {
            if (i > 0) result += ", ";
            append_string(result, object[i].key);
            result += ": ";
            append(result, object[i].value);
        }
        result += '}';
    }
}

}  // namespace

const Json* Json::find(const std::string& key) const {
    const auto* object = as<Object>();
    if (!object) return nullptr;
    for (const auto& member : *object) {
        if (member.key == key) return &member.value;
    }
    return nullptr;
}

std::string Json::text() const {
    std::string result;
    append(result, *this);
    return result;
}

Json parse_json(const std::string& text, std::size_t most_values) {
    // nlohmann's reader skips it; JSON has none.
    if (text.compare(0, 3, "\xEF\xBB\xBF") == 0) {
        throw JsonError("it begins with a byte order mark");
    }
    Builder builder(most_values);
    if (!nlohmann::json::sax_parse(text, &builder)) throw JsonError("it cannot be read");
    return builder.take();
}

}  // namespace fluxdeploy
