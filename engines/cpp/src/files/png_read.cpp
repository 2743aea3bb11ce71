#include <png.h>

#include <cstdio>
#include <cstring>

#include "errors.hpp"
#include "files/disk.hpp"
#include "files/png.hpp"

namespace fluxdeploy {
namespace {

constexpr std::int64_t kMaxPixels = std::int64_t{1} << 26;
// Bytes of so many pixels without compression.
constexpr std::int64_t kMaxBytes = 256 << 20;
// Bytes of a chunk other than pixels, which is not needed.
constexpr png_alloc_size_t kMaxChunk = 1 << 20;

// What libpng's callbacks share. A jump out of libpng skips destructors: what owns memory lives
// here, and the functions between hold plain values alone.
struct Decoder {
    explicit Decoder(const std::string& data) : bytes(data) {}
    ~Decoder() { png_destroy_read_struct(&png, &info, nullptr); }
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    const std::string& bytes;
    std::size_t at = 0;
    png_structp png = nullptr;
    png_infop info = nullptr;
    std::int64_t width = 0;
    std::int64_t height = 0;
    std::size_t channels = 0;
    std::vector<png_bytep> rows;
};

void stop(png_structp png, png_const_charp) { png_longjmp(png, 1); }

void ignore(png_structp, png_const_charp) {}

void give(png_structp png, png_bytep data, std::size_t size) {
    auto& decoder = *static_cast<Decoder*>(png_get_io_ptr(png));
    if (size > decoder.bytes.size() - decoder.at) png_error(png, "it is cut off");
    std::memcpy(data, decoder.bytes.data() + decoder.at, size);
    decoder.at += size;
}

// Everything up to the pixels, as 8-bit RGB or RGBA.
void read_head(Decoder& decoder) {
    png_structp png = decoder.png;
    png_infop info = decoder.info;
    png_set_read_fn(png, &decoder, give);
    png_set_chunk_malloc_max(png, kMaxChunk);
    // The other ancillary chunks do not change what `convert("RGB")` gives.
    png_set_keep_unknown_chunks(png, PNG_HANDLE_CHUNK_NEVER, nullptr, -1);
    const png_byte needed[] = "tRNS";
    png_set_keep_unknown_chunks(png, PNG_HANDLE_CHUNK_AS_DEFAULT, needed, 1);
    png_set_user_limits(png, kMaxPixels, kMaxPixels);
    png_read_info(png, info);
    decoder.width = png_get_image_width(png, info);
    decoder.height = png_get_image_height(png, info);
    png_set_expand(png);
    png_set_strip_16(png);
    png_set_gray_to_rgb(png);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    decoder.channels = png_get_channels(png, info);
}

void read_pixels(Decoder& decoder) {
    png_read_image(decoder.png, decoder.rows.data());
    png_read_end(decoder.png, nullptr);
}

// Whether `step` ends without an error of libpng.
bool succeeds(void (*step)(Decoder&), Decoder& decoder) {
    if (setjmp(png_jmpbuf(decoder.png))) return false;
    step(decoder);
    return true;
}

[[noreturn]] void refuse(const std::string& name) {
    throw Error(ErrorCode::usage, name + " is not a picture that can be read. Give a PNG file.");
}

// The colours of RGBA pixels to one side, and how opaque they are to the other.
void separate(const std::vector<std::uint8_t>& pixels, Picture& picture) {
    const std::size_t count = pixels.size() / 4;
    picture.rgb.resize(3 * count);
    picture.alpha.resize(count);
    for (std::size_t i = 0; i < count; ++i) {
        std::memcpy(&picture.rgb[3 * i], &pixels[4 * i], 3);
        picture.alpha[i] = pixels[4 * i + 3];
    }
}

}  // namespace

Picture decode_png(const std::string& bytes, const std::string& name) {
    Decoder decoder(bytes);
    decoder.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, stop, ignore);
    if (decoder.png) decoder.info = png_create_info_struct(decoder.png);
    if (!decoder.info) throw std::bad_alloc();
    if (!succeeds(read_head, decoder)) refuse(name);
    if (decoder.width * decoder.height > kMaxPixels) {
        throw Error(ErrorCode::usage, name +
                                          ": The picture has more than 8192 x 8192 pixels. "
                                          "Give a smaller one.");
    }
    if (decoder.channels != 3 && decoder.channels != 4) refuse(name);
    const std::size_t stride = decoder.channels * static_cast<std::size_t>(decoder.width);
    std::vector<std::uint8_t> pixels(stride * static_cast<std::size_t>(decoder.height));
    decoder.rows.resize(static_cast<std::size_t>(decoder.height));
    for (std::size_t y = 0; y < decoder.rows.size(); ++y) {
        decoder.rows[y] = pixels.data() + y * stride;
    }
    if (!succeeds(read_pixels, decoder)) refuse(name);
    Picture picture;
    picture.width = decoder.width;
    picture.height = decoder.height;
    if (decoder.channels == 4) {
        separate(pixels, picture);
    } else {
        picture.rgb = std::move(pixels);
    }
    return picture;
}

Picture read_png(const std::filesystem::path& path) {
    std::string bytes;
    try {
        bytes = read_whole(path, kMaxBytes);
    } catch (const DiskError& error) {
        throw Error(ErrorCode::internal, "Cannot read the picture " + path.string() + ": " +
                                             error.what() + ". Name another file.");
    }
    return decode_png(bytes, path.string());
}

}  // namespace fluxdeploy
