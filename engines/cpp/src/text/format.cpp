#include "text/format.hpp"

#include "files/words.hpp"
#include "text/unsupported.hpp"

namespace fluxdeploy {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& name,
                         const std::string& wanted) {
    throw Unsupported("the " + name + " of " + what + " is not " + wanted);
}

template <class Kind>
const Kind& as(const Json& part, const std::string& what, const std::string& name,
               const char* wanted) {
    const auto* value = member(part, what, name).as<Kind>();
    if (!value) refuse(what, name, wanted);
    return *value;
}

}  // namespace

const Json& member(const Json& part, const std::string& what, const std::string& name) {
    const Json* found = part.find(name);
    if (!found) throw Unsupported(what + " has no " + name);
    return *found;
}

std::string text_member(const Json& part, const std::string& what, const std::string& name) {
    return as<std::string>(part, what, name, "a string");
}

bool flag_member(const Json& part, const std::string& what, const std::string& name) {
    return as<bool>(part, what, name, "true or false");
}

bool flag_member(const Json& part, const std::string& what, const std::string& name, bool missing) {
    return is_absent(part, name) ? missing : flag_member(part, what, name);
}

const Json::Array& list_member(const Json& part, const std::string& what, const std::string& name) {
    return as<Json::Array>(part, what, name, "a list");
}

std::optional<std::string> optional_text(const Json& part, const std::string& what,
                                         const std::string& name) {
    if (is_absent(part, name)) return std::nullopt;
    return text_member(part, what, name);
}

std::optional<std::int64_t> optional_integer(const Json& part, const std::string& what,
                                             const std::string& name) {
    if (is_absent(part, name)) return std::nullopt;
    return as<std::int64_t>(part, what, name, "an integer");
}

bool is_absent(const Json& part, const std::string& name) {
    const Json* found = part.find(name);
    return !found || found->as<std::nullptr_t>();
}

}  // namespace fluxdeploy
