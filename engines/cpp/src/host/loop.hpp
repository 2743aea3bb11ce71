// The one loop over the steps, whatever the task.
#pragma once

#include <functional>
#include <vector>

#include "host/cancel.hpp"
#include "host/request.hpp"
#include "sampling/samplers.hpp"
#include "sampling/skipping.hpp"

namespace fluxdeploy {

// Changes the latents after a step, given by its index.
using Blend = std::function<void(std::int64_t step, Floats& latents)>;

// After a step: as `StepCallback`, for its caller to add previews.
using AfterStep =
    std::function<bool(std::int64_t step, std::int64_t steps, float sigma, Floats& latents)>;

// Integrate dx/dsigma = v(x, sigma) from sigmas[0] to sigmas[N], in place.
//
// With `negative`, true classifier-free guidance: v = v_neg + true_cfg_scale * (v - v_neg). With
// `skips`, the sampler is one that takes a velocity a step. `blend` comes before the check for
// finite numbers and the callback. Raises `Error` (cancelled) before a step where the token or the
// callback says so, and `Error` (numeric) after one that left NaN or infinity.
void denoise(const Sampler& sampler, Floats& latents, const std::vector<float>& sigmas,
             Velocity velocity, const Velocity& negative, double true_cfg_scale, const Skips& skips,
             const Blend& blend, const AfterStep& on_step_end, const CancelToken& cancel);

}  // namespace fluxdeploy
