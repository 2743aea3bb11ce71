#include "host/mask_crop.hpp"

#include <algorithm>

#include "errors.hpp"
#include "host/input_images.hpp"

namespace fluxdeploy {
namespace {

std::uint8_t* pixel(Picture& picture, std::int64_t row, std::int64_t column) {
    return picture.rgb.data() + (row * picture.width + column) * 3;
}

const std::uint8_t* pixel(const Picture& picture, std::int64_t row, std::int64_t column) {
    return picture.rgb.data() + (row * picture.width + column) * 3;
}

Picture black(std::int64_t width, std::int64_t height) {
    return {
        width, height, std::vector<std::uint8_t>(static_cast<std::size_t>(width * height * 3)), {}};
}

// Lay `part` over `whole`; what stands out is cut off.
void paste(Picture& whole, const Picture& part, std::int64_t left, std::int64_t top) {
    const std::int64_t first = std::max<std::int64_t>(0, -left);
    const std::int64_t end = std::min(part.width, whole.width - left);
    if (first >= end) return;
    for (std::int64_t row = 0; row < part.height; ++row) {
        if (row + top < 0 || row + top >= whole.height) continue;
        std::copy(pixel(part, row, first), pixel(part, row, first) + (end - first) * 3,
                  pixel(whole, row + top, first + left));
    }
}

Picture part_of(const Picture& picture, const Box& box) {
    Picture part = black(box.right - box.left, box.bottom - box.top);
    paste(part, picture, -box.left, -box.top);
    return part;
}

Picture resized(const Picture& picture, std::int64_t width, std::int64_t height) {
    return {width,
            height,
            resize_lanczos(picture.rgb, picture.height, picture.width, 3, height, width),
            {}};
}

// What lies beyond an edge, from the nearest pixel and the one behind it: Pillow's bicubic filter
// half a pixel outside, with its weights in 22 bits after the point.
std::uint8_t at_edge(std::uint8_t nearest, std::uint8_t behind) {
    constexpr std::int32_t near_weight = 9 << 19, behind_weight = -(1 << 19);  // 9/8 and -1/8
    const std::int32_t sum = (1 << 21) + near_weight * nearest + behind_weight * behind;
    return static_cast<std::uint8_t>(std::clamp(sum >> 22, 0, 255));
}

// Fill `width` x `height` with the edge of a picture that begins or ends there.
Picture edge_of(const Picture& picture, std::int64_t width, std::int64_t height, bool rows,
                bool last) {
    Picture filled = black(width, height);
    const std::int64_t size = rows ? picture.height : picture.width;
    const std::int64_t nearest = last ? size - 1 : 0;
    const std::int64_t behind =
        last ? std::max<std::int64_t>(size - 2, 0) : std::min<std::int64_t>(1, size - 1);
    for (std::int64_t row = 0; row < height; ++row) {
        for (std::int64_t column = 0; column < width; ++column) {
            const std::uint8_t* one =
                rows ? pixel(picture, nearest, column) : pixel(picture, row, nearest);
            const std::uint8_t* two =
                rows ? pixel(picture, behind, column) : pixel(picture, row, behind);
            for (int c = 0; c < 3; ++c) {
                pixel(filled, row, column)[c] = size == 1 ? one[c] : at_edge(one[c], two[c]);
            }
        }
    }
    return filled;
}

double ratio(std::int64_t width, std::int64_t height) {
    return static_cast<double>(width) / static_cast<double>(height);
}

// A picture resized to fit inside width x height, in the middle. What stays free is made from the
// nearest two rows or columns, as diffusers' mode "fill" does.
Picture within(const Picture& picture, std::int64_t width, std::int64_t height) {
    const bool wide = ratio(width, height) < ratio(picture.width, picture.height);
    const std::int64_t across =
        wide ? width : std::max<std::int64_t>(1, picture.width * height / picture.height);
    const std::int64_t down =
        wide ? std::max<std::int64_t>(1, picture.height * width / picture.width) : height;
    const Picture small = resized(picture, across, down);
    const std::int64_t left = width / 2 - across / 2;
    const std::int64_t top = height / 2 - down / 2;
    Picture filled = black(width, height);
    paste(filled, small, left, top);
    if (wide && top > 0) {
        paste(filled, edge_of(small, width, top, true, false), 0, 0);
        paste(filled, edge_of(small, width, top, true, true), 0, top + down);
    } else if (!wide && left > 0) {
        paste(filled, edge_of(small, left, height, false, false), 0, 0);
        paste(filled, edge_of(small, left, height, false, true), left + across, 0);
    }
    return filled;
}

// A picture resized to cover width x height; what is more on two sides is cut off.
Picture covering(const Picture& picture, std::int64_t width, std::int64_t height) {
    const bool wide = ratio(width, height) > ratio(picture.width, picture.height);
    const std::int64_t across = wide ? width : picture.width * height / picture.height;
    const std::int64_t down = wide ? picture.height * width / picture.width : height;
    Picture covered = black(width, height);
    paste(covered, resized(picture, across, down), width / 2 - across / 2, height / 2 - down / 2);
    return covered;
}

// `missing` more, half on each side; what does not fit there goes to the other side.
void grow(std::int64_t& first, std::int64_t& end, std::int64_t missing, std::int64_t size) {
    first -= missing / 2;
    end += missing - missing / 2;
    const std::int64_t back = std::max<std::int64_t>(end - size, 0);
    first -= back;
    end -= back;
    const std::int64_t forth = std::max<std::int64_t>(-first, 0);
    first += forth;
    end = std::min(end + forth, size);
}

// The smallest box around all that is not black, padded, and grown towards width / height.
Box crop_region(const std::vector<std::uint8_t>& grey, std::int64_t rows, std::int64_t columns,
                std::int64_t height, std::int64_t width, std::int64_t padding) {
    Box box{columns, rows, 0, 0};
    for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t column = 0; column < columns; ++column) {
            if (grey[static_cast<std::size_t>(row * columns + column)] == 0) continue;
            box.left = std::min(box.left, column);
            box.right = std::max(box.right, column + 1);
            box.top = std::min(box.top, row);
            box.bottom = row + 1;
        }
    }
    if (box.right == 0) {
        throw Error(ErrorCode::usage,
                    "`mask_image` marks nothing to crop to. Make white, or transparent, what is to "
                    "be redrawn.");
    }
    padding = std::min(padding, std::max(rows, columns));  // all of it, and nothing overflows
    box.left = std::max<std::int64_t>(box.left - padding, 0);
    box.top = std::max<std::int64_t>(box.top - padding, 0);
    box.right = std::min(box.right + padding, columns);
    box.bottom = std::min(box.bottom + padding, rows);
    const double wanted = ratio(width, height);
    const std::int64_t wide = box.right - box.left;
    const std::int64_t high = box.bottom - box.top;
    if (ratio(wide, high) > wanted) {
        const double missing = static_cast<double>(wide) / wanted - static_cast<double>(high);
        grow(box.top, box.bottom, static_cast<std::int64_t>(missing), rows);
    } else {
        const double missing = static_cast<double>(high) * wanted - static_cast<double>(wide);
        grow(box.left, box.right, static_cast<std::int64_t>(missing), columns);
    }
    return box;
}

void check_one(const char* name, const std::vector<Picture>& given) {
    if (given.size() == 1) return;
    throw Error(ErrorCode::usage, std::string("With `padding_mask_crop`, `") + name +
                                      "` must be one picture, not " + std::to_string(given.size()) +
                                      ".");
}

std::string size_of(const Picture& picture) {
    return std::to_string(picture.width) + "x" + std::to_string(picture.height);
}

std::uint32_t divided_by_255(std::uint32_t value) { return ((value >> 8) + value) >> 8; }

// `kept`, with its transparency `alpha`, over `drawn`: through Pillow's premultiplied form, whose
// rounding is part of the result.
std::uint8_t composed(std::uint8_t kept, std::uint32_t alpha, std::uint8_t drawn) {
    if (alpha == 0) return drawn;
    std::uint32_t value = divided_by_255(kept * alpha + 128);
    if (alpha != 255) value = std::min<std::uint32_t>(255 * value / alpha, 255);
    const std::uint32_t share = alpha << 7;
    const std::uint32_t sum = value * share + drawn * ((255u << 7) - share);
    return static_cast<std::uint8_t>(divided_by_255(sum + (0x80u << 7)) >> 7);
}

}  // namespace

Picture MaskCrop::overlay(const Picture& drawn) const {
    Picture whole = black(original.width, original.height);
    paste(whole, covering(drawn, box.right - box.left, box.bottom - box.top), box.left, box.top);
    for (std::size_t at = 0; at < whole.rgb.size(); ++at) {
        whole.rgb[at] = composed(original.rgb[at], opaque[at / 3], whole.rgb[at]);
    }
    return whole;
}

MaskCrop crop_to_mask(const std::vector<Picture>& images, const std::vector<Picture>& masks,
                      std::int64_t height, std::int64_t width, std::int64_t padding) {
    check_one("image", images);
    check_one("mask_image", masks);
    const Picture& image = images.front();
    const Picture& mask = masks.front();
    check_pixels(image);
    check_pixels(mask);
    if (image.width != mask.width || image.height != mask.height) {
        throw Error(ErrorCode::usage, "`image` has " + size_of(image) +
                                          " pixels and `mask_image` " + size_of(mask) +
                                          ". With `padding_mask_crop` they must have one size.");
    }
    std::vector<std::uint8_t> grey = to_grey(mask.rgb);
    const Box box = crop_region(grey, mask.height, mask.width, height, width, padding);
    for (std::uint8_t& value : grey) value = static_cast<std::uint8_t>(255 - value);
    return {within(part_of(image, box), width, height), within(part_of(mask, box), width, height),
            image, std::move(grey), box};
}

}  // namespace fluxdeploy
