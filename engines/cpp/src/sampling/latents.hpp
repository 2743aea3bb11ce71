// Latents between pixels and tokens: sizes, packing, the VAE's scale and its posterior.
//
// A picture of height x width pixels has h x w latents of `channels` channels, with
// h = height / spatial_factor; patch_size^2 neighbours are packed into one token, so that
// L = (h / patch_size) * (w / patch_size).
#pragma once

#include <cstdint>

#include "arrays.hpp"
#include "files/manifest.hpp"

namespace fluxdeploy {

// Raise `Error` (usage) unless both sides are positive multiples of a token's pixels (16).
void check_size(std::int64_t height, std::int64_t width, const LatentSpec& spec);

// Rows and columns of image tokens.
struct TokenGrid {
    std::int64_t rows = 0;
    std::int64_t columns = 0;
};
TokenGrid token_grid(std::int64_t height, std::int64_t width, const LatentSpec& spec);

// The shape [B, C, h, w] of a batch's latents, for height x width pixels.
Shape latent_shape(std::int64_t batch, std::int64_t height, std::int64_t width,
                   const LatentSpec& spec);

// Latents [B, C, h, w] as tokens [B, L, C * patch_size^2]: row by row, channel first.
Floats pack(const Floats& latents, const LatentSpec& spec);

// The inverse of `pack`, of height x width pixels.
Floats unpack(const Floats& tokens, std::int64_t height, std::int64_t width,
              const LatentSpec& spec);

// From the transformer's scale to the VAE's, in place: z / scaling_factor + shift_factor.
void unscale(Floats& latents, const LatentSpec& spec);

// The inverse of `unscale`, in place.
void scale(Floats& latents, const LatentSpec& spec);

// A draw of the VAE encoder's normal distribution: mean + exp(logvar / 2) * noise, with the
// log-variance cut to -30..20. All arrays have one shape; the result is in `mean`.
void sample_posterior(Floats& mean, const Floats& logvar, const Floats& noise);

// A picture's latents at noise level `sigma`: sigma * noise + (1 - sigma) * latents.
Floats scale_noise(const Floats& latents, const Floats& noise, float sigma);

}  // namespace fluxdeploy
