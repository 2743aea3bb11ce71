// Normal noise equal to that of PyTorch's CPU generator, so that a seed means the same picture.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "arrays.hpp"

namespace fluxdeploy {

// The draws of torch.Generator("cpu").manual_seed(seed), one tensor after the other. Like PyTorch,
// it keeps only the low 32 bits of the seed. docs/bundle.md has the rules.
class TorchGenerator {
public:
    explicit TorchGenerator(std::uint64_t seed);

    // What torch.randn(count) draws next; `count` may be 0.
    void normal(float* values, std::int64_t count);

private:
    std::uint32_t word();
    void twist();
    // 16 numbers of 16 words.
    void block(const std::uint32_t* words, float* values);
    // One number of a tensor of fewer than 16.
    double scalar();
    double uniform_double();

    std::array<std::uint32_t, 624> state_;
    std::size_t place_;
    std::optional<double> spare_;
};

// The generators of a call: one for all of its pictures, or one for each, as in diffusers.
class Generators {
public:
    // Without a seed nothing can be drawn.
    explicit Generators(const std::vector<std::uint64_t>& seeds)
        : generators_(seeds.begin(), seeds.end()) {}

    // What comes next; number k of the first axis from generator k of several.
    Floats normal(Shape shape);

private:
    std::vector<TorchGenerator> generators_;
};

}  // namespace fluxdeploy
