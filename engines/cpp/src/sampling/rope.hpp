// Rotary position embedding: cosine and sine of the joint sequence's ids.
#pragma once

#include <cstdint>
#include <vector>

#include "arrays.hpp"
#include "files/manifest.hpp"
#include "sampling/latents.hpp"

namespace fluxdeploy {

// Tables, float32 [S + L, head_dim] each.
struct RopeTables {
    Floats cos;
    Floats sin;
};

// Of `text_tokens` tokens with ids of zeros, then those of the pictures, row by row, whose last two
// numbers are row and column. Those of the second picture, and of each after it, have their
// picture's number, from 1 on, as their first number. Raises `Error` (bundle) for fewer than two
// axes.
RopeTables rope_tables(const RopeSpec& spec, std::int64_t text_tokens,
                       const std::vector<TokenGrid>& pictures);

}  // namespace fluxdeploy
