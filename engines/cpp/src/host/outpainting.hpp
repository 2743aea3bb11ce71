// Outpainting is inpainting on a larger canvas, where the margins are what is redrawn.
#pragma once

#include <cstdint>

#include "files/png.hpp"

namespace fluxdeploy {

// A canvas, and the mask of its size: white in the margins.
struct Canvas {
    Picture image;
    Picture mask;
};

// A canvas with `image` and margins of so many pixels around it, which repeat its edge. A few more
// are added on the right and at the bottom where the sides would be no multiples of 16. Raises
// `Error` (usage) for margins that are none, and for more than 8192 x 8192 pixels.
Canvas outpaint_canvas(const Picture& image, std::int64_t left, std::int64_t top,
                       std::int64_t right, std::int64_t bottom);

}  // namespace fluxdeploy
