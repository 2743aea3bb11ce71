#include "sampling/latents.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "errors.hpp"

namespace fluxdeploy {
namespace {

// The multiple of `side` at or next to `pixels`, below or above, and at least `side`.
std::int64_t nearest(std::int64_t pixels, std::int64_t side, bool up) {
    if (pixels < side) return side;
    const std::int64_t below = pixels - pixels % side;
    // There may be none above that a number holds.
    const bool possible = below <= std::numeric_limits<std::int64_t>::max() - side;
    return up && below != pixels && possible ? below + side : below;
}

// `each(at of tokens, at of latents)` for every number of both.
template <class Each>
void for_each_number(std::int64_t batch, std::int64_t rows, std::int64_t columns,
                     const LatentSpec& spec, Each each) {
    const std::int64_t patch = spec.patch_size;
    const std::int64_t height = rows * patch;
    const std::int64_t width = columns * patch;
    std::size_t token = 0;
    for (std::int64_t b = 0; b < batch; ++b)
        for (std::int64_t row = 0; row < rows; ++row)
            for (std::int64_t column = 0; column < columns; ++column)
                for (std::int64_t c = 0; c < spec.channels; ++c)
                    for (std::int64_t y = 0; y < patch; ++y)
                        for (std::int64_t x = 0; x < patch; ++x) {
                            const std::int64_t line =
                                (b * spec.channels + c) * height + row * patch + y;
                            each(token++,
                                 static_cast<std::size_t>(line * width + column * patch + x));
                        }
}

}  // namespace

void check_size(std::int64_t height, std::int64_t width, const LatentSpec& spec) {
    const std::int64_t side = spec.spatial_factor * spec.patch_size;
    if (height > 0 && width > 0 && height % side == 0 && width % side == 0) return;
    const auto size = [&](bool up) {
        return std::to_string(nearest(width, side, up)) + "x" +
               std::to_string(nearest(height, side, up));
    };
    const std::string below = size(false);
    const std::string above = size(true);
    throw Error(ErrorCode::usage,
                "A picture of " + std::to_string(width) + "x" + std::to_string(height) +
                    " pixels (width x height) cannot be made: both sides must be positive "
                    "multiples of " +
                    std::to_string(side) + ". The nearest sizes are " + below +
                    (above == below ? "" : " or " + above) + ".");
}

TokenGrid token_grid(std::int64_t height, std::int64_t width, const LatentSpec& spec) {
    const std::int64_t side = spec.spatial_factor * spec.patch_size;
    return {height / side, width / side};
}

Shape latent_shape(std::int64_t batch, std::int64_t height, std::int64_t width,
                   const LatentSpec& spec) {
    return {batch, spec.channels, height / spec.spatial_factor, width / spec.spatial_factor};
}

Floats pack(const Floats& latents, const LatentSpec& spec) {
    const std::int64_t rows = latents.shape[2] / spec.patch_size;
    const std::int64_t columns = latents.shape[3] / spec.patch_size;
    Floats tokens(
        {latents.shape[0], rows * columns, spec.channels * spec.patch_size * spec.patch_size});
    for_each_number(latents.shape[0], rows, columns, spec, [&](std::size_t token, std::size_t at) {
        tokens.values[token] = latents.values[at];
    });
    return tokens;
}

Floats unpack(const Floats& tokens, std::int64_t height, std::int64_t width,
              const LatentSpec& spec) {
    const TokenGrid grid = token_grid(height, width, spec);
    Floats latents(latent_shape(tokens.shape[0], height, width, spec));
    for_each_number(
        tokens.shape[0], grid.rows, grid.columns, spec,
        [&](std::size_t token, std::size_t at) { latents.values[at] = tokens.values[token]; });
    return latents;
}

void unscale(Floats& latents, const LatentSpec& spec) {
    const float factor = static_cast<float>(spec.scaling_factor);
    const float shift = static_cast<float>(spec.shift_factor);
    for (float& z : latents.values) z = z / factor + shift;
}

void scale(Floats& latents, const LatentSpec& spec) {
    const float factor = static_cast<float>(spec.scaling_factor);
    const float shift = static_cast<float>(spec.shift_factor);
    for (float& z : latents.values) z = (z - shift) * factor;
}

void sample_posterior(Floats& mean, const Floats& logvar, const Floats& noise) {
    for (std::size_t i = 0; i < mean.values.size(); ++i) {
        const float cut = std::clamp(logvar.values[i], -30.0f, 20.0f);
        mean.values[i] += std::exp(0.5f * cut) * noise.values[i];
    }
}

Floats scale_noise(const Floats& latents, const Floats& noise, float sigma) {
    Floats noised(noise.shape);
    for (std::size_t i = 0; i < noised.values.size(); ++i) {
        noised.values[i] = sigma * noise.values[i] + (1.0f - sigma) * latents.values[i];
    }
    return noised;
}

}  // namespace fluxdeploy
