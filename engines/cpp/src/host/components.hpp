// The opened components of a bundle, as one pipeline uses them.
//
// Every output is checked for NaN, and a call that was cancelled runs none.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "backends/registry.hpp"
#include "host/cancel.hpp"

namespace fluxdeploy {

// What a call asks of a component: its sizes by the symbols of the manifest.
using AskedSizes = std::vector<std::pair<std::string, std::map<std::string, std::int64_t>>>;

// Raise `Error` (usage) for a size that a component's engine does not take.
void check_range(const std::string& component, const std::string& symbol, std::int64_t size,
                 const DimensionRange& allowed);

// Raise `Error` (numeric), naming the component and the step, where a value is NaN or infinite.
void check_finite(const Floats& values, const std::string& component, std::int64_t step = -1,
                  std::int64_t steps = 0);

// Holds the engines that this pipeline needs. With `low_vram` one is held only until it is
// released.
class Components {
public:
    Components(std::shared_ptr<EnginePool> pool, bool low_vram);

    // The component's engine, opened now where it is not.
    Engine& engine(const std::string& component);

    // Run a component. A batch that is larger than the engine takes runs in parts. Raises `Error`
    // (cancelled), and `Error` (numeric) where an output is not finite.
    Outputs run(const CancelToken& cancel, const std::string& component, const Inputs& inputs);

    // Let go of an engine that this call needs no more, where memory is short.
    void release(const std::string& component);

    // Let go of what a call that failed has left open, where memory is short.
    void release_all();

    // Refuse what one of the engines cannot do, before the long work. All of them are opened here,
    // so that one that is broken is known as early, unless memory is to hold one at a time: then
    // the manifest tells what they can do. Raises `Error` (usage), and `Error` (cancelled).
    void check_sizes(const CancelToken& cancel, const AskedSizes& sizes);

    EnginePool& pool() { return *pool_; }
    std::shared_ptr<EnginePool> share_pool() const { return pool_; }
    bool low_vram() const { return low_vram_; }

private:
    std::shared_ptr<EnginePool> pool_;
    bool low_vram_;
    std::map<std::string, std::shared_ptr<Engine>> engines_;
};

}  // namespace fluxdeploy
