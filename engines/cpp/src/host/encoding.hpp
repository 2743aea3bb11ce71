// Given pictures as latents: what the VAE encoder makes of them.
#pragma once

#include <utility>
#include <vector>

#include "host/components.hpp"
#include "host/prompts.hpp"
#include "host/request.hpp"
#include "sampling/noise.hpp"

namespace fluxdeploy {

inline constexpr const char* kEncoder = "vae_encoder";

// Mean and log-variance of the latents of pictures [Bi, 3, H, W], at the VAE's scale: [Bi, C, h, w]
// each. One picture at a time. Raises `Error` (engine) where the encoder gives other shapes.
std::pair<Floats, Floats> encode(const Floats& images, const LatentSpec& spec, const Run& run);

// Their draw by `epsilon` of that shape, at the transformer's scale.
Floats known_latents(const Floats& images, const Floats& epsilon, const LatentSpec& spec,
                     const Run& run);

// What the encoder is asked for.
AskedSizes encoder_sizes(std::int64_t height, std::int64_t width, const LatentSpec& spec);

// `values` again and again, for `batch` pictures.
Floats repeat(const Floats& values, std::int64_t batch);

// Each of `values` as often as it takes for `batch`, one after the other.
Floats repeat_each(const Floats& values, std::int64_t batch);

// Control pictures, [Bc, 3, H, W] in -1..1: one for all, one a prompt or one a picture. Raises
// `Error` (usage) for another number of them.
Floats read_controls(const std::vector<Picture>& images, const Request& request);

// What a picture of noise alone begins with, [B, L, C], packed: the caller's latents, or drawn.
Floats start_noise(const Request& request, const LatentSpec& spec, Generators& generators);

// Latents of control pictures, [B, L, C], packed: a draw of its own for each of `batch` pictures.
Floats control_latents(const Floats& images, std::int64_t batch, const LatentSpec& spec,
                       Generators& generators, const Run& run);

}  // namespace fluxdeploy
