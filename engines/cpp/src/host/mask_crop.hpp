// The part of a picture around its mask: drawn in full size, and laid over the picture again.
//
// As `padding_mask_crop` of diffusers' pipelines, with the bytes of the Python host.
#pragma once

#include <cstdint>
#include <vector>

#include "files/png.hpp"

namespace fluxdeploy {

// Right and bottom are outside.
struct Box {
    std::int64_t left = 0;
    std::int64_t top = 0;
    std::int64_t right = 0;
    std::int64_t bottom = 0;
};

// What is drawn, and what it is laid over. `image` and `mask` have the size that a task draws;
// `opaque` has a byte for each pixel of `original`: 255 where it stays, 0 where it is redrawn.
struct MaskCrop {
    Picture image;
    Picture mask;
    Picture original;
    std::vector<std::uint8_t> opaque;
    Box box;

    // The original with a drawn picture in its place.
    Picture overlay(const Picture& drawn) const;
};

// The part of a picture around its mask, with `padding` pixels more on each side, grown towards
// width / height as far as the picture goes. Raises `Error` (usage) unless there is one image and
// one mask, of one size, with something to redraw.
MaskCrop crop_to_mask(const std::vector<Picture>& images, const std::vector<Picture>& masks,
                      std::int64_t height, std::int64_t width, std::int64_t padding);

}  // namespace fluxdeploy
