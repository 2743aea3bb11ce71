// PNG files: pictures to begin from, and pictures that were made.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace fluxdeploy {

// A picture in 8 bits, row by row from the top. `rgb` has 3 bytes a pixel; `alpha` has one, or is
// empty where the picture has no transparency.
struct Picture {
    std::int64_t width = 0;
    std::int64_t height = 0;
    std::vector<std::uint8_t> rgb;
    std::vector<std::uint8_t> alpha;
};

// Keywords and texts (UTF-8) of a PNG's text chunks, in order.
using PngText = std::vector<std::pair<std::string, std::string>>;

// The picture in a PNG. Of 16 bits the high 8 stay, of fewer they are spread over the range; grey
// and palettes become RGB; no gamma, colour profile or EXIF orientation is applied. As Pillow's
// `convert("RGB")`.
// Raises `Error` (usage) for bytes that hold no whole picture, or more than 8192 x 8192 pixels;
// `name` is the file's, for errors.
Picture decode_png(const std::string& bytes, const std::string& name);

// As `decode_png`, of a file. Raises `Error` (internal) for one that cannot be read.
Picture read_png(const std::filesystem::path& path);

// The bytes of an RGB PNG with text chunks: tEXt where Latin-1 holds the text, else iTXt.
// `picture.alpha` is not written. Raises `Error` (usage) for sizes that do not fit the bytes.
std::string encode_png(const Picture& picture, const PngText& text);

// Write `encode_png` to a file, which is there whole or not at all. Raises `Error` (usage) for a
// name that does not end in .png, and `Error` (internal) where the disk refuses.
void write_png(const std::filesystem::path& path, const Picture& picture, const PngText& text);

}  // namespace fluxdeploy
