// What a picture is made from besides its prompt: where the loop begins.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "host/loop.hpp"
#include "host/mask_crop.hpp"
#include "host/prompts.hpp"
#include "host/request.hpp"
#include "sampling/latents.hpp"
#include "sampling/noise.hpp"

namespace fluxdeploy {

// What a ControlNet reads, [B, L, C], packed, and how much it counts: `mode` is the kind of
// control, where it knows several, and `scales` what its residuals are multiplied with in each
// step.
struct ControlInput {
    ControlNetRecord record;
    Floats latents;
    std::optional<std::int64_t> mode;
    std::vector<float> scales;

    bool counts() const;
};

// What the loop begins with: `latents` [B, L, C], packed, on which it works in place; `sigmas`, the
// N + 1 noise levels that it goes through; `blend` changes the latents after every step. `channels`
// [B, L, C'] stand beside the latents in every step, and `tokens` [B, R, C], those of pictures of
// `references` tokens, behind them. `controls` are of the ControlNets that run beside it.
struct Start {
    Floats latents;
    std::vector<float> sigmas;
    Blend blend;
    Floats channels;
    Floats tokens;
    std::vector<TokenGrid> references;
    std::vector<ControlInput> controls = {};
};

// A request for one task, with the task's own arguments read and checked.
class Task {
public:
    virtual ~Task() = default;

    // N: how many of the schedule's steps are made.
    virtual std::int64_t steps() const = 0;

    // What components are asked for otherwise than for a picture from text alone.
    virtual AskedSizes engine_sizes() const { return {}; }

    // Arguments that do nothing here, a sentence each.
    virtual std::vector<std::string> notices() const { return {}; }

    // What the drawn pictures are laid over, where only a part of one is drawn; else null.
    virtual const MaskCrop* crop() const { return nullptr; }

    // What the loop begins with; `sigmas` is the whole schedule. `generators` are those of the
    // request's seeds, and nothing is drawn from none.
    virtual Start prepare(const std::vector<float>& sigmas, Generators& generators,
                          const Run& run) const = 0;
};

// Height and width of the pictures, for those that are asked for; none is the bundle's. Raises
// `Error` (usage) for a value that cannot be.
AskedSize asked_size(const Manifest& manifest, const Arguments& arguments);

// The task that a call's arguments ask for. `request` and `manifest` outlive it. Raises `Error`
// (usage) for a value that cannot be, and for a task that the bundle lacks a component for.
std::unique_ptr<Task> choose_task(const Manifest& manifest, const Request& request,
                                  const Arguments& arguments);

// Whether random numbers are drawn in the task that the arguments ask for. Raises as
// `unused_arguments`.
bool draws(const Manifest& manifest, const Arguments& arguments);

// A sentence for each argument that does nothing in the task that the others ask for. Raises
// `Error` (usage) for one that asks for another task.
std::vector<std::string> unused_arguments(const Manifest& manifest, const Arguments& arguments);

}  // namespace fluxdeploy
