#include "host/previews.hpp"

#include <algorithm>
#include <cmath>

#include "errors.hpp"
#include "sampling/latents.hpp"

namespace fluxdeploy {

const PreviewSpec& require_linear(const Manifest& manifest) {
    if (manifest.preview) return *manifest.preview;
    throw Error(ErrorCode::usage,
                "This bundle has no map from latents to colours, which previews of each step take. "
                "Build it again with `fluxdeploy build`.");
}

LinearPreviews::LinearPreviews(const Manifest& manifest, std::int64_t height, std::int64_t width,
                               const std::vector<float>& sigmas)
    : spec_(manifest.latents),
      linear_(require_linear(manifest)),
      height_(height),
      width_(width),
      sigmas_(sigmas) {}

const PreviewPictures& LinearPreviews::after_step(std::int64_t step, const Floats& latents) {
    const float level = sigmas_[static_cast<std::size_t>(step) + 1];
    const float way = level - sigmas_[static_cast<std::size_t>(step)];
    Floats end = latents;
    // Levels near noise can be equal in float32: such a step goes nowhere.
    if (way != 0) {
        for (std::size_t i = 0; i < end.values.size(); ++i) {
            end.values[i] -= level * ((end.values[i] - before_.values[i]) / way);
        }
    }
    draw(end);
    return pictures_;
}

void LinearPreviews::draw(const Floats& tokens) {
    const Floats latents = unpack(tokens, height_, width_, spec_);
    const std::int64_t channels = latents.shape[1];
    const std::int64_t plane = latents.shape[2] * latents.shape[3];
    pictures_.height = latents.shape[2];
    pictures_.width = latents.shape[3];
    pictures_.rgb.resize(static_cast<std::size_t>(latents.shape[0] * plane * 3));
    auto to = pictures_.rgb.begin();
    for (std::int64_t at = 0; at < latents.shape[0] * plane; ++at) {
        const float* pixel = latents.data() + at / plane * channels * plane + at % plane;
        for (std::size_t colour = 0; colour < 3; ++colour) {
            auto value = static_cast<float>(linear_.bias[colour]);
            for (std::int64_t channel = 0; channel < channels; ++channel) {
                const auto& row = linear_.matrix[static_cast<std::size_t>(channel)];
                value += static_cast<float>(row[colour]) * pixel[channel * plane];
            }
            value = std::clamp(value, 0.0f, 1.0f);
            *to++ = static_cast<std::uint8_t>(std::nearbyint(value * 255.0f));
        }
    }
}

}  // namespace fluxdeploy
