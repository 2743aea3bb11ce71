// The recipe of a quantized component. It is for people and for the next build, and only checked.
#pragma once

#include <string>

#include "files/json.hpp"

namespace fluxdeploy {

// Raises `FieldError` for a value that is neither null nor a recipe that something can be made of.
void check_recipe(const Json& json, const std::string& where);

}  // namespace fluxdeploy
