#include "host/outpainting.hpp"

#include <algorithm>
#include <string>

#include "arguments.hpp"
#include "errors.hpp"
#include "host/input_images.hpp"

namespace fluxdeploy {
namespace {

constexpr std::int64_t kMultiple = 16;
constexpr std::int64_t kMaxMargin = std::int64_t{1} << 40;  // sums of a few stay countable

std::int64_t side(std::int64_t before, std::int64_t size, std::int64_t after) {
    return (before + size + after + kMultiple - 1) / kMultiple * kMultiple;
}

}  // namespace

Canvas outpaint_canvas(const Picture& image, std::int64_t left, std::int64_t top,
                       std::int64_t right, std::int64_t bottom) {
    const std::pair<const char*, std::int64_t> margins[] = {
        {"left", left}, {"top", top}, {"right", right}, {"bottom", bottom}};
    for (const auto& [name, margin] : margins) check_integer(name, margin, 0, kMaxMargin);
    if (left == 0 && top == 0 && right == 0 && bottom == 0) {
        throw Error(ErrorCode::usage, "No pixels are to be added. Give at least one side some.");
    }
    check_pixels(image);
    const std::int64_t width = side(left, image.width, right);
    const std::int64_t height = side(top, image.height, bottom);
    if (width > kMaxPixels / height) {
        throw Error(ErrorCode::usage, "The canvas would have " + std::to_string(width) + "x" +
                                          std::to_string(height) +
                                          " pixels; at most 8192 x 8192 are possible. Add fewer.");
    }
    const auto bytes = static_cast<std::size_t>(width * height * 3);
    Canvas canvas{{width, height, std::vector<std::uint8_t>(bytes), {}},
                  {width, height, std::vector<std::uint8_t>(bytes, 255), {}}};
    for (std::int64_t row = 0; row < height; ++row) {
        const std::int64_t from_row = std::clamp<std::int64_t>(row - top, 0, image.height - 1);
        for (std::int64_t column = 0; column < width; ++column) {
            const std::int64_t from = std::clamp<std::int64_t>(column - left, 0, image.width - 1);
            const std::int64_t at = (row * width + column) * 3;
            std::copy_n(image.rgb.data() + (from_row * image.width + from) * 3, 3,
                        canvas.image.rgb.data() + at);
            if (from_row == row - top && from == column - left) {
                std::fill_n(canvas.mask.rgb.data() + at, 3, std::uint8_t{0});
            }
        }
    }
    return canvas;
}

}  // namespace fluxdeploy
