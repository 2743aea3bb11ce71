#include "sampling/samplers.hpp"

#include <cmath>
#include <memory>

#include "errors.hpp"
#include "files/words.hpp"

namespace fluxdeploy {
namespace {

// Differences and products of levels are double, and float32 where they meet latents.
double length_of(const std::vector<float>& sigmas, std::size_t index) {
    return static_cast<double>(sigmas[index + 1]) - static_cast<double>(sigmas[index]);
}

// to = from + along * by
void go(Floats& to, const Floats& from, const float* along, double by) {
    const auto factor = static_cast<float>(by);
    for (std::size_t i = 0; i < to.values.size(); ++i) {
        to.values[i] = from.values[i] + along[i] * factor;
    }
}

std::vector<float> beginnings(const std::vector<float>& sigmas) {
    return {sigmas.begin(), sigmas.end() - 1};
}

std::vector<float> with_middles(const std::vector<float>& sigmas) {
    std::vector<float> levels;
    for (std::size_t i = 0; i + 1 < sigmas.size(); ++i) {
        levels.push_back(sigmas[i]);
        levels.push_back((sigmas[i] + sigmas[i + 1]) / 2.0f);
    }
    return levels;
}

// Of the last step its thirds: models have not seen level 0.
std::vector<float> with_thirds(const std::vector<float>& sigmas) {
    std::vector<float> levels = with_middles(beginnings(sigmas));
    const float begin = sigmas[sigmas.size() - 2];
    const float third = (sigmas.back() - begin) / 3.0f;
    levels.insert(levels.end(), {begin, begin + third, sigmas.back() - third});
    return levels;
}

Step euler(Floats& latents, const std::vector<float>& sigmas) {
    return [&](std::size_t index, const Velocity& velocity) {
        const float* found = velocity(static_cast<std::int64_t>(index), latents);
        go(latents, latents, found, length_of(sigmas, index));
    };
}

// The mean of the velocities at both ends of a step; the last step is Euler's.
Step heun(Floats& latents, const std::vector<float>& sigmas) {
    return [&, change = std::vector<float>(latents.values.size()),
            ahead = Floats(latents.shape)](std::size_t index, const Velocity& velocity) mutable {
        const auto length = static_cast<float>(length_of(sigmas, index));
        const auto level = static_cast<std::int64_t>(index);
        const float* found = velocity(level, latents);
        for (std::size_t i = 0; i < change.size(); ++i) change[i] = found[i] * length;
        if (index + 2 < sigmas.size()) {
            for (std::size_t i = 0; i < change.size(); ++i) {
                ahead.values[i] = latents.values[i] + change[i];
            }
            found = velocity(level + 1, ahead);
            for (std::size_t i = 0; i < change.size(); ++i) {
                change[i] = (change[i] + found[i] * length) * 0.5f;
            }
        }
        for (std::size_t i = 0; i < change.size(); ++i) latents.values[i] += change[i];
    };
}

Step midpoint(Floats& latents, const std::vector<float>& sigmas) {
    return [&, middle = Floats(latents.shape)](std::size_t index,
                                               const Velocity& velocity) mutable {
        const double length = length_of(sigmas, index);
        const auto level = static_cast<std::int64_t>(2 * index);
        go(middle, latents, velocity(level, latents), length / 2);
        go(latents, latents, velocity(level + 1, middle), length);
    };
}

// A velocity of a step: its level after the first, the share of the step to go along it next, and
// its weight in the mean.
struct Stage {
    std::int64_t level;
    double share;
    double weight;
};

// The classical method of fourth order; the last step is Heun's of third order.
Step rk4(Floats& latents, const std::vector<float>& sigmas) {
    static const std::vector<Stage> whole{
        {0, 1.0 / 2, 1.0 / 6}, {1, 1.0 / 2, 1.0 / 3}, {1, 1.0, 1.0 / 3}, {2, 0.0, 1.0 / 6}};
    static const std::vector<Stage> last{
        {0, 1.0 / 3, 1.0 / 4}, {1, 2.0 / 3, 0.0}, {2, 0.0, 3.0 / 4}};
    return [&, mean = Floats(latents.shape), ahead = Floats(latents.shape)](
               std::size_t index, const Velocity& velocity) mutable {
        const double length = length_of(sigmas, index);
        ahead.values = latents.values;
        mean.values.assign(mean.values.size(), 0.0f);
        for (const Stage& stage : index + 2 == sigmas.size() ? last : whole) {
            const auto level = static_cast<std::int64_t>(2 * index) + stage.level;
            const float* found = velocity(level, ahead);
            go(mean, mean, found, stage.weight * length);
            go(ahead, latents, found, stage.share * length);
        }
        for (std::size_t i = 0; i < mean.values.size(); ++i) latents.values[i] += mean.values[i];
    };
}

// Adams-Bashforth of second order: the velocity goes on as it did from the step before.
Step ab2(Floats& latents, const std::vector<float>& sigmas) {
    return [&, before = std::vector<float>(latents.values.size())](
               std::size_t index, const Velocity& velocity) mutable {
        const double length = length_of(sigmas, index);
        const double earlier = index > 0 ? length_of(sigmas, index - 1) : 0;
        const double lean = earlier != 0 ? length / (2 * earlier) : 0;
        const auto own = static_cast<float>((1 + lean) * length);
        const auto other = static_cast<float>(lean * length);
        const float* found = velocity(static_cast<std::int64_t>(index), latents);
        for (std::size_t i = 0; i < before.size(); ++i) {
            const float change = found[i] * own;
            latents.values[i] += lean != 0 ? change - before[i] * other : change;
            before[i] = found[i];
        }
    };
}

// lambda: the logarithm of the share of picture over that of noise.
double log_ratio(double sigma) {
    return sigma < 1 ? std::log1p(-sigma) - std::log(sigma) : -HUGE_VAL;
}

// How much of the last change of the picture the next half step adds: h / (2 h_before).
double lean_of(const std::vector<float>& sigmas, std::size_t index) {
    if (index == 0 || index + 2 >= sigmas.size()) return 0;
    const double earlier = log_ratio(static_cast<double>(sigmas[index - 1]));
    const double now = log_ratio(static_cast<double>(sigmas[index]));
    const double after = log_ratio(static_cast<double>(sigmas[index + 1]));
    const bool rising = now > earlier && earlier > -HUGE_VAL;
    return rising ? (after - now) / (2 * (now - earlier)) : 0;
}

// DPM-Solver++(2M): the picture that the velocity points at goes on as it did, over lambda.
Step dpmpp_2m(Floats& latents, const std::vector<float>& sigmas) {
    return [&, before = std::vector<float>(latents.values.size())](
               std::size_t index, const Velocity& velocity) mutable {
        const double sigma = static_cast<double>(sigmas[index]);
        const double after = static_cast<double>(sigmas[index + 1]);
        const double weight = (1 - after) - (1 - sigma) * after / sigma;
        const double lean = lean_of(sigmas, index);
        const auto level = static_cast<float>(sigma), kept = static_cast<float>(after / sigma);
        const auto own = static_cast<float>((1 + lean) * weight);
        const auto other = static_cast<float>(lean * weight);
        const float* found = velocity(static_cast<std::int64_t>(index), latents);
        for (std::size_t i = 0; i < before.size(); ++i) {
            float& value = latents.values[i];
            const float picture = value - found[i] * level;
            value = value * kept + picture * own;
            if (lean != 0) value -= before[i] * other;
            before[i] = picture;
        }
    };
}

// Euler's first, which is the one where none is asked for.
const std::vector<Sampler>& samplers() {
    static const std::vector<Sampler> all{
        {"euler", true, beginnings, euler},
        {"ab2", true, beginnings, ab2},
        {"dpmpp_2m", true, beginnings, dpmpp_2m},
        {"heun", false, beginnings, heun},
        {"midpoint", false, with_middles, midpoint},
        {"rk4", false, with_thirds, rk4},
    };
    return all;
}

}  // namespace

const Sampler& find_sampler(const std::string& name) {
    std::string names;
    for (const Sampler& sampler : samplers()) {
        if (name == sampler.name) return sampler;
        names += (names.empty() ? "" : ", ") + in_quotes(sampler.name);
    }
    throw Error(ErrorCode::usage,
                "There is no sampler " + in_quotes(name) + ". Use one of " + names + ".");
}

}  // namespace fluxdeploy
