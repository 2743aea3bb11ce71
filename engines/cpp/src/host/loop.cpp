#include "host/loop.hpp"

#include "errors.hpp"
#include "host/components.hpp"

namespace fluxdeploy {

namespace {

// The velocity of true classifier-free guidance; `away` outlives it.
Velocity guided(const Velocity& towards, const Velocity& away, float scale) {
    return [towards, &away, scale, mixed = std::vector<float>()](
               std::int64_t level, const Floats& latents) mutable -> const float* {
        const float* to = towards(level, latents);
        const float* from = away(level, latents);
        mixed.resize(latents.values.size());
        for (std::size_t i = 0; i < mixed.size(); ++i) {
            mixed[i] = from[i] + (to[i] - from[i]) * scale;
        }
        return mixed.data();
    };
}

}  // namespace

void denoise(const Sampler& sampler, Floats& latents, const std::vector<float>& sigmas,
             Velocity velocity, const Velocity& negative, double true_cfg_scale, const Skips& skips,
             const Blend& blend, const AfterStep& on_step_end, const CancelToken& cancel) {
    const auto steps = static_cast<std::int64_t>(sigmas.size()) - 1;
    if (negative) velocity = guided(velocity, negative, static_cast<float>(true_cfg_scale));
    if (!skips.steps.empty()) velocity = Extrapolated(velocity, sampler.levels(sigmas), skips);
    const Step step = sampler.start(latents, sigmas);
    for (std::int64_t index = 0; index < steps; ++index) {
        cancel.check("after " + std::to_string(index) + " of " + std::to_string(steps) + " steps");
        step(static_cast<std::size_t>(index), velocity);
        if (blend) blend(index, latents);
        check_finite(latents, "transformer", index, steps);
        if (!on_step_end) continue;
        if (!on_step_end(index, steps, sigmas[static_cast<std::size_t>(index)], latents)) {
            // This call alone: others may share the token.
            throw Error(ErrorCode::cancelled, "Cancelled after " + std::to_string(index + 1) +
                                                  " of " + std::to_string(steps) +
                                                  " steps; no picture was made.");
        }
        if (!all_finite(latents.data(), latents.size())) {
            throw Error(ErrorCode::numeric,
                        "callback_on_step_end left NaN or infinity in the latents at step " +
                            std::to_string(index + 1) + ". Check what it returns or changes.");
        }
    }
}

}  // namespace fluxdeploy
