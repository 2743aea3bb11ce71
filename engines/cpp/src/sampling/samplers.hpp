// Samplers: how latents go from one noise level to the next along their velocity. The formulas, and
// the order of their operations, are those of the modules of fluxdeploy/sampling/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "arrays.hpp"

namespace fluxdeploy {

// dx/dsigma of latents at one of a sampler's levels, given by its index; read before the next call
// only.
using Velocity = std::function<const float*(std::int64_t level, const Floats& latents)>;

// Takes the latents that it was started with from sigmas[index] to sigmas[index + 1].
using Step = std::function<void(std::size_t index, const Velocity& velocity)>;

// `sigmas` are the N + 1 levels of N steps.
struct Sampler {
    const char* name;
    // Whether a step takes one velocity, where it begins.
    bool one_a_step;
    // All noise levels at which the steps take the velocity.
    std::vector<float> (*levels)(const std::vector<float>& sigmas);
    // The step function, which changes `latents` in place; both arguments outlive it.
    Step (*start)(Floats& latents, const std::vector<float>& sigmas);
};

// The sampler of that name. Raises `Error` (usage) where there is none.
const Sampler& find_sampler(const std::string& name);

}  // namespace fluxdeploy
