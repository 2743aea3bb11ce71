// Rotary position embedding: cosine and sine of the joint sequence's ids.
#pragma once

#include <cstdint>

#include "arrays.hpp"
#include "files/manifest.hpp"

namespace fluxdeploy {

// Tables, float32 [S + L, head_dim] each.
struct RopeTables {
    Floats cos;
    Floats sin;
};

// Of `text_tokens` tokens with ids of zeros, then rows * columns image tokens, row by row, whose
// last two numbers are row and column. Raises `Error` (bundle) for fewer than two axes.
RopeTables rope_tables(const RopeSpec& spec, std::int64_t text_tokens, std::int64_t rows,
                       std::int64_t columns);

}  // namespace fluxdeploy
