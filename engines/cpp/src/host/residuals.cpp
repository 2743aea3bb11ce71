#include "host/residuals.hpp"

#include <algorithm>

#include "arguments.hpp"
#include "errors.hpp"
#include "files/boundary.hpp"

namespace fluxdeploy {
namespace {

// Add what a ControlNet gave, multiplied, to `total`, which may take the first ones alone.
void add_scaled(const Floats& given, float scale, Floats& total) {
    const float* from = given.data();
    for (float& value : total.values) value += *from++ * scale;
}

// Raise `Error` (engine) for residuals that are fewer, or of other sizes, than the transformer's.
void check_given(const std::string& component, const std::string& name, const Shape& given,
                 const Shape& wanted) {
    const bool fits = given.size() == wanted.size() && given.front() >= wanted.front() &&
                      std::equal(given.begin() + 1, given.end(), wanted.begin() + 1);
    if (fits) return;
    throw Error(ErrorCode::engine, "The " + component + " gave " + name + " " + shown(given) +
                                       " where the transformer takes " + shown(wanted) +
                                       ". Build the bundle again with `fluxdeploy build`.");
}

}  // namespace

Residuals zero_residuals(const Engine& transformer, std::int64_t pictures, std::int64_t tokens) {
    Residuals zeros;
    for (const TensorSpec& spec : transformer.inputs) {
        if (!is_residuals(spec.name)) continue;
        zeros[spec.name] = Floats({std::get<std::int64_t>(spec.shape.front()), pictures, tokens,
                                   std::get<std::int64_t>(spec.shape.back())});
    }
    return zeros;
}

ControlResiduals::ControlResiduals(const Engine& transformer,
                                   std::vector<RunningControlNet> controlnets,
                                   const RopeTables& positions, bool keep,
                                   std::function<void()> between)
    : transformer_(transformer),
      controlnets_(std::move(controlnets)),
      positions_(positions),
      keep_(keep),
      between_(std::move(between)) {}

const Residuals& ControlResiduals::compute(std::int64_t level, const Floats& latents,
                                           BatchPart part) {
    if (!keep_) kept_.clear();
    Residuals& total = kept_[part.start];
    total = zero_residuals(transformer_, part.size(), latents.shape[1]);
    for (const RunningControlNet& controlnet : controlnets_) {
        const float scale = controlnet.scales[step_];
        if (scale == 0) continue;
        const Outputs given = run(controlnet, level, latents, part);
        for (auto& [name, sum] : total) {
            const auto found = given.find(name);
            if (found == given.end()) continue;
            check_given(controlnet.engine.component, name, found->second.shape, sum.shape);
            add_scaled(found->second, scale, sum);
        }
    }
    return total;
}

Outputs ControlResiduals::run(const RunningControlNet& controlnet, std::int64_t level,
                              const Floats& latents, BatchPart part) const {
    const Condition& condition = controlnet.condition;
    const std::int64_t length = latents.shape[1], width = latents.shape[2];
    const std::int64_t start = part.start * length * width;
    const Shape states{part.size(), length, width};
    Floats context, modulation, mode;
    condition.take_context(part, context);
    condition.take_modulation(level, part, modulation);
    Inputs inputs{{"hidden_states", View(states, latents.data() + start)},
                  {"control_latents", View(states, controlnet.latents.data() + start)},
                  {"context", context},
                  {"modulation", modulation},
                  {"rope_cos", positions_.cos},
                  {"rope_sin", positions_.sin}};
    if (condition.mode) {
        condition.take_mode(part, mode);
        inputs.emplace("mode", mode);
    }
    return run_in_parts(controlnet.engine, inputs, between_);
}

}  // namespace fluxdeploy
