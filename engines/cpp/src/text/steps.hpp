// What is done with a text before the model: normalizers, and pre-tokenizers, which split it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "files/json.hpp"
#include "text/regex.hpp"

namespace fluxdeploy {

// Changes a text.
using Normalizer = std::function<std::u32string(std::u32string)>;

// Splits a piece of text into others, none of them empty.
using PreTokenizer = std::function<std::vector<std::u32string>(std::u32string)>;

// The file's `normalizer`, or `pre_tokenizer`; null changes nothing. Raises `Unsupported`, by name,
// for one that is not known here.
Normalizer read_normalizer(const Json& json);
PreTokenizer read_pre_tokenizer(const Json& json);

// The expression that a part of the file has as its `pattern`: `{"Regex": ...}` or
// `{"String": ...}`. Raises `Unsupported`.
Regex read_pattern(const Json& part, const std::string& what);

}  // namespace fluxdeploy
