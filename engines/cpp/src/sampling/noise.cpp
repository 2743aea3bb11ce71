#include "sampling/noise.hpp"

#include <cmath>
#include <vector>

namespace fluxdeploy {
namespace {

constexpr std::int64_t kBlock = 16;
constexpr std::size_t kShift = 397;
constexpr double kTwoPi = 6.283185307179586476925286766559;

}  // namespace

// mt19937 as of Matsumoto and Nishimura, 2002: init_genrand and genrand_int32.
TorchGenerator::TorchGenerator(std::uint64_t seed) {
    place_ = state_.size();
    state_[0] = static_cast<std::uint32_t>(seed);
    for (std::size_t i = 1; i < state_.size(); ++i) {
        const std::uint32_t before = state_[i - 1];
        state_[i] = 1812433253u * (before ^ (before >> 30)) + static_cast<std::uint32_t>(i);
    }
}

void TorchGenerator::twist() {
    const std::size_t size = state_.size();
    for (std::size_t i = 0; i < size; ++i) {
        const std::uint32_t joined =
            (state_[i] & 0x80000000u) | (state_[(i + 1) % size] & 0x7fffffffu);
        state_[i] =
            state_[(i + kShift) % size] ^ (joined >> 1) ^ ((joined & 1u) != 0 ? 0x9908b0dfu : 0u);
    }
    place_ = 0;
}

std::uint32_t TorchGenerator::word() {
    if (place_ == state_.size()) twist();
    std::uint32_t y = state_[place_++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

void TorchGenerator::normal(float* values, std::int64_t count) {
    if (count < kBlock) {
        for (std::int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(scalar());
        return;
    }
    std::uint32_t words[kBlock];
    const std::int64_t whole = count - count % kBlock;
    for (std::int64_t start = 0; start < whole; start += kBlock) {
        for (std::uint32_t& each : words) each = word();
        block(words, values + start);
    }
    if (whole == count) return;
    // A word was drawn for each number before the last block is drawn afresh.
    for (std::int64_t i = whole; i < count; ++i) word();
    for (std::uint32_t& each : words) each = word();
    block(words, values + count - kBlock);
}

// Box-Muller: 8 radii, then 8 angles, give 8 cosines, then 8 sines. The transcendental functions go
// through float64, whose results round to the same float32 on every CPU.
void TorchGenerator::block(const std::uint32_t* words, float* values) {
    constexpr std::int64_t half = kBlock / 2;
    const auto uniform = [words](std::int64_t i) {
        return static_cast<float>(words[i] & 0xffffffu) * 0x1p-24f;
    };
    for (std::int64_t i = 0; i < half; ++i) {
        const float log = static_cast<float>(std::log(static_cast<double>(1.0f - uniform(i))));
        const float radius = std::sqrt(-2.0f * log);
        const double angle = static_cast<float>(kTwoPi) * uniform(i + half);
        values[i] = radius * static_cast<float>(std::cos(angle));
        values[i + half] = radius * static_cast<float>(std::sin(angle));
    }
}

// The second number of a pair waits for the next small tensor, whatever is drawn between.
double TorchGenerator::scalar() {
    if (spare_) {
        const double value = *spare_;
        spare_.reset();
        return value;
    }
    const double angle = kTwoPi * uniform_double();
    const double radius = std::sqrt(-2.0 * std::log1p(-uniform_double()));
    spare_ = radius * std::sin(angle);
    return radius * std::cos(angle);
}

double TorchGenerator::uniform_double() {
    const std::uint64_t high = word();
    const std::uint64_t low = word();
    const std::uint64_t bits = (high << 32 | low) & ((std::uint64_t{1} << 53) - 1);
    return static_cast<double>(bits) * 0x1p-53;
}

Floats Generators::normal(Shape shape) {
    Floats values(std::move(shape));
    if (generators_.size() == 1) {
        generators_.front().normal(values.data(), values.size());
        return values;
    }
    const std::int64_t row = values.size() / values.shape.front();
    for (std::int64_t k = 0; k < values.shape.front(); ++k) {
        generators_[static_cast<std::size_t>(k)].normal(values.data() + k * row, row);
    }
    return values;
}

}  // namespace fluxdeploy
