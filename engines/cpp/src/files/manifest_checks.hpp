// What records of a manifest may say of each other, and in which range.
#pragma once

#include <string>

#include "files/json.hpp"
#include "files/manifest.hpp"

namespace fluxdeploy {

// Raises `FieldError` for text that would move a terminal's cursor or turn what stands around it,
// and for nesting that no manifest has. `provenance` is free-form: who shows it has to escape it.
void check_text(const Json& json, const std::string& where, int depth);

// Raises `FieldError` for a manifest that could not be run.
void check_manifest(const Manifest& manifest);

}  // namespace fluxdeploy
