// Batches that are larger than an engine takes: it runs several times, each time on a part.
//
// How many an engine takes decides how long a call lasts, and never what comes out of it.
#pragma once

#include <functional>
#include <vector>

#include "backends/engine.hpp"

namespace fluxdeploy {

// Rows `start` to `end` of a batch.
struct BatchPart {
    std::int64_t start = 0;
    std::int64_t end = 0;
    std::int64_t size() const { return end - start; }
};

// The parts of a batch that an engine takes, in order: as few, and as even, as can be.
std::vector<BatchPart> divide(const Engine& engine, std::int64_t batch);

// Run an engine on a batch of any size; the outputs are those of the whole. `between` is called
// between the runs of the parts; what it raises ends them.
Outputs run_in_parts(Engine& engine, const Inputs& inputs, const std::function<void()>& between);

}  // namespace fluxdeploy
