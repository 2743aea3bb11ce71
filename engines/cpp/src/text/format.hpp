// The parts of a tokenizer's file: objects with a `type`, whose unknown members mean nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "files/json.hpp"

namespace fluxdeploy {

// The member `name` of a part that is called `what` in errors. Each raises `Unsupported` for one of
// another type, and, without a default, for a missing one.
const Json& member(const Json& part, const std::string& what, const std::string& name);
std::string text_member(const Json& part, const std::string& what, const std::string& name);
bool flag_member(const Json& part, const std::string& what, const std::string& name);
bool flag_member(const Json& part, const std::string& what, const std::string& name, bool missing);
const Json::Array& list_member(const Json& part, const std::string& what, const std::string& name);
std::optional<std::string> optional_text(const Json& part, const std::string& what,
                                         const std::string& name);
std::optional<std::int64_t> optional_integer(const Json& part, const std::string& what,
                                             const std::string& name);

// Whether there is no such member, or it is null.
bool is_absent(const Json& part, const std::string& name);

}  // namespace fluxdeploy
