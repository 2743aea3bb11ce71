// The noise levels of a rectified flow, bit-equal to diffusers' where nothing spaces them anew.
#pragma once

#include <cstdint>
#include <vector>

#include "files/manifest.hpp"

namespace fluxdeploy {

// More steps than any machine makes, and few enough for memory to hold their levels.
constexpr std::int64_t kMaxSteps = 1000000;

// What is shifted, float32 [N]: from 1 to 1/N, in even steps. Raises `Error` (usage) for a number
// that is none of steps.
std::vector<float> even_levels(std::int64_t num_inference_steps);

// Noise levels, float32 [N + 1]: from 1 (all noise) down to 0 (the picture), of `levels` [N], which
// fall and are shifted. Step i goes from level i to level i + 1, and level i is the model's
// timestep in 0..1. Raises `Error` (usage) for numbers of steps and tokens that make no levels.
std::vector<float> sigmas(const ScheduleSpec& spec, std::vector<float> levels,
                          std::int64_t image_tokens);

// The step of the schedule that image to image begins with, for a strength of 0 to 1: all N steps
// are made at 1, none at 0, and else N * strength of them, rounded up.
std::int64_t first_step(std::int64_t num_inference_steps, double strength);

}  // namespace fluxdeploy
