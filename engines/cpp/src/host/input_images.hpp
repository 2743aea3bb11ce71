// Pictures that the caller gives, made into what the VAE encoder takes.
#pragma once

#include <cstdint>
#include <vector>

#include "arrays.hpp"
#include "files/png.hpp"

namespace fluxdeploy {

// Of a picture that is given: 8192 x 8192.
inline constexpr std::int64_t kMaxPixels = std::int64_t{1} << 26;

// Raise `Error` (usage) for a picture without pixels, and for one of more than 8192 x 8192.
void check_pixels(const Picture& image);

// RGB as grey, a byte a pixel. Bit-equal to Pillow's.
std::vector<std::uint8_t> to_grey(const std::vector<std::uint8_t>& rgb);

// A picture of 8 bits and `channels` channels a pixel, resized with a Lanczos filter of three
// lobes, stretched where the picture shrinks: along the rows, then along the columns, rounded to 8
// bits after each. Bit-equal to Pillow's where that goes along the rows first: Pillow 13 takes the
// columns first for some pictures that become lower, which rounds otherwise by a few of 255. A
// picture of the right size stays as it is.
std::vector<std::uint8_t> resize_lanczos(const std::vector<std::uint8_t>& pixels,
                                         std::int64_t height, std::int64_t width,
                                         std::int64_t channels, std::int64_t new_height,
                                         std::int64_t new_width);

// Pictures as the VAE encoder takes them: float32 [B, 3, height, width] in -1..1. Raises `Error`
// (usage) for a picture without pixels, and for one of more than 8192 x 8192.
Floats to_pixels(const std::vector<Picture>& images, std::int64_t height, std::int64_t width);

// Masks, [B * height * width], true where the picture is drawn again: white, at least 128 of 255 in
// grey. Resized as pictures are, and raises as they do.
std::vector<bool> to_masks(const std::vector<Picture>& masks, std::int64_t height,
                           std::int64_t width);

// What of a mask's file is to be drawn again, as RGB: where it is not wholly opaque, what is
// transparent, as OpenAI's images API has it; else what is white.
std::vector<std::uint8_t> mask_of(const Picture& picture);

}  // namespace fluxdeploy
