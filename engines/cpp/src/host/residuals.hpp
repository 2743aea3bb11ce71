// What ControlNets add inside the transformer: run, scaled and summed for each evaluation.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "host/batches.hpp"
#include "host/prompts.hpp"
#include "sampling/rope.hpp"

namespace fluxdeploy {

// `double_residuals` and `single_residuals`, [n, B, L, D], for the transformer.
using Residuals = std::map<std::string, Floats>;

// A ControlNet of a call: what the prompts make of it; [B, L, C], what it is controlled by; and
// what its residuals are multiplied with in each step, where with 0 it is not run.
struct RunningControlNet {
    Engine& engine;
    Condition condition;
    Floats latents;
    std::vector<float> scales;
};

// The residuals of a call's ControlNets. As in diffusers they come from the prompts alone: where
// there are negative prompts too, the evaluation for those takes what was computed for the others
// at the same latents.
class ControlResiduals {
public:
    // `transformer` takes the residuals; `keep` is whether there are negative prompts. `between` is
    // called between runs; what it raises ends them. What is referred to outlives it.
    ControlResiduals(const Engine& transformer, std::vector<RunningControlNet> controlnets,
                     const RopeTables& positions, bool keep, std::function<void()> between);

    bool any() const { return !controlnets_.empty(); }

    // The loop is at that step now.
    void set_step(std::int64_t step) { step_ = static_cast<std::size_t>(step); }

    // For a part of the latents [B, L, C] at one of the conditions' noise levels. It is read before
    // the next call for this part only.
    const Residuals& compute(std::int64_t level, const Floats& latents, BatchPart part);

    // What was computed last for a part.
    const Residuals& recall(BatchPart part) const { return kept_.at(part.start); }

private:
    Outputs run(const RunningControlNet& controlnet, std::int64_t level, const Floats& latents,
                BatchPart part) const;

    const Engine& transformer_;
    std::vector<RunningControlNet> controlnets_;
    const RopeTables& positions_;
    bool keep_;
    std::function<void()> between_;
    std::size_t step_ = 0;
    // By where a part of the batch starts; one for all parts where nothing is recalled.
    std::map<std::int64_t, Residuals> kept_;
};

// What a transformer is given where no ControlNet runs, for so many pictures; nothing where it
// takes nothing.
Residuals zero_residuals(const Engine& transformer, std::int64_t pictures, std::int64_t tokens);

}  // namespace fluxdeploy
