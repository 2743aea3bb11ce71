#include "host/loop.hpp"

#include "errors.hpp"
#include "host/components.hpp"
#include "sampling/euler.hpp"

namespace fluxdeploy {

void denoise(Floats& latents, const std::vector<float>& sigmas, const Velocity& velocity,
             const Velocity& negative, double true_cfg_scale, const Blend& blend,
             const StepCallback& on_step_end, const CancelToken& cancel) {
    const auto steps = static_cast<std::int64_t>(sigmas.size()) - 1;
    const auto scale = static_cast<float>(true_cfg_scale);
    std::vector<float> mixed(negative ? latents.values.size() : 0);
    for (std::int64_t index = 0; index < steps; ++index) {
        cancel.check("after " + std::to_string(index) + " of " + std::to_string(steps) + " steps");
        const float* towards = velocity(index, latents);
        if (negative) {
            const float* away = negative(index, latents);
            for (std::size_t i = 0; i < mixed.size(); ++i) {
                mixed[i] = away[i] + (towards[i] - away[i]) * scale;
            }
            towards = mixed.data();
        }
        euler_step(latents.values, towards, sigmas, static_cast<std::size_t>(index));
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
