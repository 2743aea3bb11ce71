#include "host/input_images.hpp"

#include <algorithm>
#include <cmath>

#include "errors.hpp"

namespace fluxdeploy {
namespace {

constexpr double kLobes = 3;
// Bits after the point of a weight: a sum of weights times 8 bits fits into 32.
constexpr int kBits = 32 - 8 - 2;
constexpr double kPi = 3.14159265358979323846;

double sinc(double x) { return x == 0 ? 1 : std::sin(x * kPi) / (x * kPi); }

double lanczos(double x) { return -kLobes <= x && x < kLobes ? sinc(x) * sinc(x / kLobes) : 0; }

// Which old pixels make a new one, and with which weights.
struct Taps {
    std::int64_t first = 0;
    std::vector<std::int32_t> weights;
};

std::vector<Taps> taps_for(std::int64_t old_size, std::int64_t new_size) {
    const double step = static_cast<double>(old_size) / static_cast<double>(new_size);
    const double stretch = std::max(step, 1.0);
    const double reach = kLobes * stretch;
    std::vector<Taps> taps(static_cast<std::size_t>(new_size));
    for (std::int64_t place = 0; place < new_size; ++place) {
        Taps& own = taps[static_cast<std::size_t>(place)];
        const double center = (static_cast<double>(place) + 0.5) * step;
        own.first = std::max<std::int64_t>(static_cast<std::int64_t>(center - reach + 0.5), 0);
        const std::int64_t end =
            std::min<std::int64_t>(static_cast<std::int64_t>(center + reach + 0.5), old_size);
        std::vector<double> exact;
        double sum = 0;
        for (std::int64_t at = own.first; at < end; ++at) {
            exact.push_back(lanczos((static_cast<double>(at) - center + 0.5) * (1.0 / stretch)));
            sum += exact.back();
        }
        for (const double weight : exact) {
            const double scaled = (sum != 0 ? weight / sum : weight) * (1 << kBits);
            own.weights.push_back(static_cast<std::int32_t>(scaled + (scaled < 0 ? -0.5 : 0.5)));
        }
    }
    return taps;
}

// One direction. A line of `taps.size()` new pixels is made of one of old pixels that lie `stride`
// bytes apart: the channels of a pixel, or a whole row.
void weigh(const std::uint8_t* old, std::uint8_t* made, const std::vector<Taps>& taps,
           std::int64_t stride) {
    for (const Taps& own : taps) {
        for (std::int64_t c = 0; c < stride; ++c) {
            std::int32_t sum = 1 << (kBits - 1);
            const std::uint8_t* from = old + own.first * stride + c;
            for (const std::int32_t weight : own.weights) {
                sum += weight * static_cast<std::int32_t>(*from);
                from += stride;
            }
            made[c] = static_cast<std::uint8_t>(std::clamp(sum >> kBits, 0, 255));
        }
        made += stride;
    }
}

// A picture of the caller's in another size.
std::vector<std::uint8_t> resized_to(const Picture& image, std::int64_t height,
                                     std::int64_t width) {
    check_pixels(image);
    return resize_lanczos(image.rgb, image.height, image.width, 3, height, width);
}

}  // namespace

void check_pixels(const Picture& image) {
    if (image.width < 1 || image.height < 1) {
        throw Error(ErrorCode::usage,
                    "A picture without pixels cannot be resized. Give another one.");
    }
    if (image.width > kMaxPixels / image.height) {
        throw Error(ErrorCode::usage,
                    "The picture has more than 8192 x 8192 pixels. Give a smaller one.");
    }
}

std::vector<std::uint8_t> to_grey(const std::vector<std::uint8_t>& rgb) {
    std::vector<std::uint8_t> grey;
    grey.reserve(rgb.size() / 3);
    for (std::size_t at = 0; at < rgb.size(); at += 3) {
        // ITU-R 601's luma in 16 bits after the point, rounded as Pillow does.
        const std::uint32_t luma =
            19595u * rgb[at] + 38470u * rgb[at + 1] + 7471u * rgb[at + 2] + 0x8000u;
        grey.push_back(static_cast<std::uint8_t>(luma >> 16));
    }
    return grey;
}

std::vector<std::uint8_t> resize_lanczos(const std::vector<std::uint8_t>& pixels,
                                         std::int64_t height, std::int64_t width,
                                         std::int64_t channels, std::int64_t new_height,
                                         std::int64_t new_width) {
    std::vector<std::uint8_t> wide = pixels;
    if (new_width != width) {
        wide.resize(static_cast<std::size_t>(height * new_width * channels));
        const auto taps = taps_for(width, new_width);
        for (std::int64_t row = 0; row < height; ++row) {
            weigh(pixels.data() + row * width * channels, wide.data() + row * new_width * channels,
                  taps, channels);
        }
    }
    if (new_height == height) return wide;
    std::vector<std::uint8_t> made(static_cast<std::size_t>(new_height * new_width * channels));
    weigh(wide.data(), made.data(), taps_for(height, new_height), new_width * channels);
    return made;
}

Floats to_pixels(const std::vector<Picture>& images, std::int64_t height, std::int64_t width) {
    Floats pixels({static_cast<std::int64_t>(images.size()), 3, height, width});
    float* to = pixels.data();
    for (const Picture& image : images) {
        const auto resized = resized_to(image, height, width);
        for (std::size_t c = 0; c < 3; ++c) {
            for (std::size_t at = c; at < resized.size(); at += 3) {
                *to++ = 2.0f * (static_cast<float>(resized[at]) / 255.0f) - 1.0f;
            }
        }
    }
    return pixels;
}

std::vector<bool> to_masks(const std::vector<Picture>& masks, std::int64_t height,
                           std::int64_t width) {
    std::vector<bool> marked;
    for (const Picture& mask : masks) {
        for (const std::uint8_t value : to_grey(resized_to(mask, height, width))) {
            marked.push_back(value >= 128);
        }
    }
    return marked;
}

std::vector<std::uint8_t> mask_of(const Picture& picture) {
    const bool opaque = std::all_of(picture.alpha.begin(), picture.alpha.end(),
                                    [](std::uint8_t alpha) { return alpha == 255; });
    if (opaque) return picture.rgb;
    std::vector<std::uint8_t> mask;
    mask.reserve(picture.rgb.size());
    for (const std::uint8_t alpha : picture.alpha) {
        mask.insert(mask.end(), 3, static_cast<std::uint8_t>(255 - alpha));
    }
    return mask;
}

}  // namespace fluxdeploy
