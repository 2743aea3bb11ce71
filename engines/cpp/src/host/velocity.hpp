// The transformer as a velocity: bound to its prompts, with a task's channels and tokens.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "host/batches.hpp"
#include "host/cancel.hpp"
#include "host/prompts.hpp"
#include "host/residuals.hpp"
#include "sampling/rope.hpp"

namespace fluxdeploy {

// What the transformer reads: the latents [B, L, C], with channels [B, L, C'] beside and tokens
// [B, R, C + C'] behind them, either of which may be none.
class HiddenStates {
public:
    HiddenStates(Floats channels, Floats tokens)
        : channels_(std::move(channels)), tokens_(std::move(tokens)) {}

    // The whole, [B, L + R, C + C'], until the next call; the latents themselves where there is
    // nothing else.
    const Floats& around(const Floats& latents);

private:
    Floats channels_;
    Floats tokens_;
    Floats all_;
};

// dx/dsigma of the latents, with all that no step changes in place. A batch that is larger than the
// engine takes is computed part by part, in buffers that serve every part.
class ModulatedTransformer {
public:
    // What ControlNets give for a part of the latents at a level, until the next call for it.
    using Added =
        std::function<const Residuals&(std::int64_t level, const Floats& latents, BatchPart part)>;

    // `hidden` outlives it. Without `added`, zeros stand for what ControlNets give.
    ModulatedTransformer(Engine& engine, const Condition& condition, const RopeTables& positions,
                         HiddenStates& hidden, CancelToken cancel, Added added = {});

    // The velocity [B, L, C] of `latents` at one of the condition's noise levels. It is read before
    // the next call only. Raises `Error` (cancelled) between two parts.
    const float* operator()(std::int64_t level, const Floats& latents);

private:
    // What is bound for parts of one size; whether the prompts are, too.
    struct Bound {
        std::unique_ptr<Binding> binding;
        bool has_context = false;
    };

    const Condition& condition_;
    HiddenStates& hidden_;
    CancelToken cancel_;
    Added added_;
    std::vector<BatchPart> parts_;
    std::map<std::int64_t, Bound> bindings_;
    Floats context_;
    Floats modulation_;
    Floats velocity_;
};

}  // namespace fluxdeploy
