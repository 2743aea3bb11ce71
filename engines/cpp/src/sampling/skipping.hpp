// Steps without the transformer: their velocity is extrapolated from those before.
#pragma once

#include <cstdint>
#include <deque>
#include <set>
#include <utility>
#include <vector>

#include "sampling/samplers.hpp"

namespace fluxdeploy {

// Which steps take no velocity of their own, counted from 0, and the degree of the polynomial in
// sigma that gives it: 0 holds the last value, 1 is a line, 2 a parabola. A step with fewer values
// before it takes a lower one, and one with none is not skipped.
struct Skips {
    std::set<std::int64_t> steps;
    std::int64_t order = 1;

    // The same, counted from the step `first` on, with which a call begins.
    Skips after(std::int64_t first) const;
};

// A `Velocity` that asks another one only at levels that are not skipped. `levels` are those of a
// sampler that takes one a step.
class Extrapolated {
public:
    Extrapolated(Velocity velocity, std::vector<float> levels, Skips skips);

    const float* operator()(std::int64_t level, const Floats& latents);

private:
    const float* guess(double sigma);

    Velocity velocity_;
    std::vector<float> levels_;
    Skips skips_;
    // Level and values, the latest last.
    std::deque<std::pair<double, std::vector<float>>> known_;
    std::vector<float> sum_;
};

}  // namespace fluxdeploy
