// Euler's method along a rectified flow (arXiv 2209.03003): x += (sigma[i+1] - sigma[i]) * v.
#pragma once

#include <cstddef>
#include <vector>

namespace fluxdeploy {

// The velocity is taken where a step begins: [N] of the [N + 1] levels.
inline std::vector<float> euler_levels(const std::vector<float>& sigmas) {
    return {sigmas.begin(), sigmas.end() - 1};
}

// Take `latents` in place from sigmas[index] to sigmas[index + 1].
inline void euler_step(std::vector<float>& latents, const float* velocity,
                       const std::vector<float>& sigmas, std::size_t index) {
    const float change = sigmas[index + 1] - sigmas[index];
    for (std::size_t i = 0; i < latents.size(); ++i) latents[i] += velocity[i] * change;
}

}  // namespace fluxdeploy
