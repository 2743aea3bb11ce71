#include "sampling/schedule.hpp"

#include <algorithm>
#include <cmath>

#include "arguments.hpp"
#include "errors.hpp"
#include "sampling/spacing.hpp"

namespace fluxdeploy {
namespace {

constexpr double kMaxExponent = 80;  // a float32 holds e to this power, and its inverse
constexpr double kMaxShift = 1e30;

// mu: base_shift to max_shift between the two sizes, linear in the number of image tokens.
double shift_exponent(const ScheduleSpec& spec, std::int64_t image_tokens) {
    const double slope = (spec.max_shift - spec.base_shift) /
                         static_cast<double>(spec.max_image_seq_len - spec.base_image_seq_len);
    const double offset = spec.base_shift - slope * static_cast<double>(spec.base_image_seq_len);
    return static_cast<double>(image_tokens) * slope + offset;
}

void shift_by_size(std::vector<float>& levels, const std::string& kind, double mu) {
    const bool exponential = kind == "exponential";
    const bool possible = exponential ? std::fabs(mu) <= kMaxExponent : 0 < mu && mu <= kMaxShift;
    if (!possible) {
        throw Error(ErrorCode::usage,
                    "This bundle's schedule makes no noise levels for a picture of this size: its "
                    "shift would be " +
                        general(mu) + ". Ask for a size nearer to the bundle's default.");
    }
    const float factor = static_cast<float>(exponential ? std::exp(mu) : mu);
    for (float& level : levels) level = factor / (factor + (1.0f / level - 1.0f));
    if (levels.size() > 1 && levels.back() == 1.0f) {
        throw Error(ErrorCode::usage,
                    "This bundle's schedule makes no noise levels for a picture of this size: with "
                    "a shift of " +
                        general(mu) + " all of the " + std::to_string(levels.size()) +
                        " levels are 1. Ask for a size nearer to the bundle's default.");
    }
}

// Stretch the levels, seen from 1, so that the last one before 0 is `terminal`.
void stretch(std::vector<float>& levels, double terminal) {
    const float last = 1.0f - levels.back();
    if (last == 0.0f) {
        throw Error(ErrorCode::usage,
                    "This bundle's schedule stretches to a terminal level, which one step cannot "
                    "reach: num_inference_steps must be at least 2.");
    }
    const float scale = last / static_cast<float>(1.0 - terminal);
    for (float& level : levels) level = 1.0f - (1.0f - level) / scale;
}

}  // namespace

std::vector<float> even_levels(std::int64_t num_inference_steps) {
    const std::int64_t steps =
        check_integer("num_inference_steps", num_inference_steps, 1, kMaxSteps);
    const double last = 1.0 / static_cast<double>(steps);
    const double between = steps > 1 ? (last - 1.0) / static_cast<double>(steps - 1) : 0.0;
    std::vector<float> levels(static_cast<std::size_t>(steps));
    for (std::int64_t i = 0; i < steps; ++i) {
        levels[static_cast<std::size_t>(i)] =
            static_cast<float>(static_cast<double>(i) * between + 1.0);
    }
    levels.back() = static_cast<float>(last);
    return levels;
}

std::vector<float> sigmas(const ScheduleSpec& spec, std::vector<float> levels,
                          std::int64_t image_tokens) {
    check_integer("image_tokens", image_tokens, 1);
    if (spec.use_dynamic_shifting) {
        shift_by_size(levels, spec.time_shift_type, shift_exponent(spec, image_tokens));
    } else {
        const float shift = static_cast<float>(spec.shift);
        const float less = static_cast<float>(spec.shift - 1.0);
        for (float& level : levels) level = shift * level / (1.0f + less * level);
    }
    // As in diffusers, 0 means no stretching.
    if (spec.shift_terminal && *spec.shift_terminal != 0) stretch(levels, *spec.shift_terminal);
    if (spec.spacing) levels = spaced(*spec.spacing, levels);
    levels.push_back(0.0f);
    return levels;
}

std::int64_t first_step(std::int64_t num_inference_steps, double strength) {
    const double steps = static_cast<double>(num_inference_steps);
    return static_cast<std::int64_t>(steps - std::min(steps * strength, steps));
}

}  // namespace fluxdeploy
