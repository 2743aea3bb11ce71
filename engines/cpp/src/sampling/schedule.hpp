// The noise levels of a rectified flow, bit-equal to diffusers' where nothing spaces them anew.
#pragma once

#include <cstdint>
#include <vector>

#include "files/manifest.hpp"

namespace fluxdeploy {

// Noise levels, float32 [N + 1]: from 1 (all noise) down to 0 (the picture). Step i goes from level
// i to level i + 1, and level i is the model's timestep in 0..1. Raises `Error` (usage) for numbers
// of steps and tokens that make no levels.
std::vector<float> sigmas(const ScheduleSpec& spec, std::int64_t num_inference_steps,
                          std::int64_t image_tokens);

// The step of the schedule that image to image begins with, for a strength of 0 to 1: all N steps
// are made at 1, none at 0, and else N * strength of them, rounded up.
std::int64_t first_step(std::int64_t num_inference_steps, double strength);

}  // namespace fluxdeploy
