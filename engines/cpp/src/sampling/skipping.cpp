#include "sampling/skipping.hpp"

namespace fluxdeploy {

Skips Skips::after(std::int64_t first) const {
    Skips left{{}, order};
    for (const std::int64_t step : steps) {
        if (step > first) left.steps.insert(step - first);
    }
    return left;
}

Extrapolated::Extrapolated(Velocity velocity, std::vector<float> levels, Skips skips)
    : velocity_(std::move(velocity)), levels_(std::move(levels)), skips_(std::move(skips)) {}

const float* Extrapolated::operator()(std::int64_t level, const Floats& latents) {
    const auto sigma = static_cast<double>(levels_[static_cast<std::size_t>(level)]);
    if (skips_.steps.count(level) > 0 && !known_.empty()) return guess(sigma);
    const float* found = velocity_(level, latents);
    const auto most = static_cast<std::size_t>(skips_.order) + 1;
    std::vector<float> kept;
    if (!known_.empty() && known_.back().first == sigma) {
        kept = std::move(known_.back().second);
        known_.pop_back();
    } else if (known_.size() == most) {
        kept = std::move(known_.front().second);
        known_.pop_front();
    }
    kept.assign(found, found + latents.values.size());
    known_.emplace_back(sigma, std::move(kept));
    return known_.back().second.data();
}

const float* Extrapolated::guess(double sigma) {
    sum_.assign(known_.front().second.size(), 0.0f);
    for (const auto& [own, values] : known_) {
        double weight = 1;
        for (const auto& other : known_) {
            if (other.first != own) weight *= (sigma - other.first) / (own - other.first);
        }
        const auto factor = static_cast<float>(weight);
        for (std::size_t i = 0; i < sum_.size(); ++i) sum_[i] += values[i] * factor;
    }
    return sum_.data();
}

}  // namespace fluxdeploy
