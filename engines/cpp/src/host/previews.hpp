// Pictures of a running call: what it would end with, as far as its latest step can tell.
#pragma once

#include <cstdint>
#include <vector>

#include "arrays.hpp"
#include "files/manifest.hpp"
#include "host/request.hpp"

namespace fluxdeploy {

// The bundle's map from latents to colours. Raises `Error` (usage) where an old one has none.
const PreviewSpec& require_linear(const Manifest& manifest);

// Shows where a call is going, one pixel for each latent. A step goes along the velocity v = (x' -
// x) / (s' - s), from latents x at noise level s to x' at s'; the picture that it points at is
// where that line meets level 0: x' - s' v.
class LinearPreviews {
public:
    // Of packed latents of height x width pixels; `sigmas` are the levels of the steps. `manifest`
    // and `sigmas` outlive it. Raises `Error` (usage) where the bundle has no map.
    LinearPreviews(const Manifest& manifest, std::int64_t height, std::int64_t width,
                   const std::vector<float>& sigmas);

    // Remember the latents that the next step begins with.
    void before_step(const Floats& latents) { before_ = latents; }

    // The pictures that step number `step` points at. They are read before the next call only.
    const PreviewPictures& after_step(std::int64_t step, const Floats& latents);

private:
    void draw(const Floats& tokens);

    const LatentSpec& spec_;
    const PreviewSpec& linear_;
    const std::int64_t height_, width_;
    const std::vector<float>& sigmas_;
    Floats before_;
    PreviewPictures pictures_;
};

}  // namespace fluxdeploy
