#include <png.h>

#include <algorithm>
#include <cctype>
#include <cstring>

#include "errors.hpp"
#include "files/disk.hpp"
#include "files/png.hpp"
#include "files/utf8.hpp"

namespace fluxdeploy {
namespace {

// A chunk's name and what it holds.
using Chunk = std::pair<const char*, std::string>;

// What libpng's callbacks share. A jump out of libpng skips destructors: what owns memory lives
// here, and the functions between hold plain values alone.
struct Encoder {
    explicit Encoder(const Picture& given) : picture(given) {}
    ~Encoder() { png_destroy_write_struct(&png, &info); }
    Encoder(const Encoder&) = delete;
    Encoder& operator=(const Encoder&) = delete;

    const Picture& picture;
    std::vector<Chunk> chunks;
    png_structp png = nullptr;
    png_infop info = nullptr;
    std::string bytes;
    bool full = false;
};

void stop(png_structp png, png_const_charp) { png_longjmp(png, 1); }

void ignore(png_structp, png_const_charp) {}

void take(png_structp png, png_bytep data, std::size_t size) {
    auto& encoder = *static_cast<Encoder*>(png_get_io_ptr(png));
    try {
        encoder.bytes.append(reinterpret_cast<const char*>(data), size);
        return;
    } catch (const std::bad_alloc&) {
        encoder.full = true;
    }
    png_error(png, "memory ran out");
}

void flush(png_structp) {}

// A text as Pillow writes it: in Latin-1 where that holds it, else in UTF-8.
Chunk text_chunk(const std::string& keyword, const std::string& text) {
    const std::u32string codes = decode_utf8(text);
    const bool latin = std::all_of(codes.begin(), codes.end(), [](char32_t c) { return c < 256; });
    if (!latin) {
        // Not packed, in no named language, with no translated keyword.
        return {"iTXt", keyword + std::string(5, '\0') + encode_utf8(codes)};
    }
    std::string body = keyword + '\0';
    for (const char32_t code : codes) body += static_cast<char>(code);
    return {"tEXt", std::move(body)};
}

void write(Encoder& encoder) {
    png_structp png = encoder.png;
    const Picture& picture = encoder.picture;
    png_set_write_fn(png, &encoder, take, flush);
    png_set_IHDR(png, encoder.info, static_cast<png_uint_32>(picture.width),
                 static_cast<png_uint_32>(picture.height), 8, PNG_COLOR_TYPE_RGB,
                 PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    png_write_info(png, encoder.info);
    for (const Chunk& chunk : encoder.chunks) {
        png_write_chunk(png, reinterpret_cast<png_const_bytep>(chunk.first),
                        reinterpret_cast<png_const_bytep>(chunk.second.data()),
                        chunk.second.size());
    }
    const std::size_t stride = 3 * static_cast<std::size_t>(picture.width);
    for (std::size_t y = 0; y < static_cast<std::size_t>(picture.height); ++y) {
        png_write_row(png, picture.rgb.data() + y * stride);
    }
    png_write_end(png, encoder.info);
}

// Whether `write` ends without an error of libpng.
bool succeeds(Encoder& encoder) {
    if (setjmp(png_jmpbuf(encoder.png))) return false;
    write(encoder);
    return true;
}

bool is_png_name(const std::filesystem::path& path) {
    std::string suffix = path.extension().string();
    for (char& letter : suffix) {
        letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
    }
    return suffix == ".png";
}

}  // namespace

std::string encode_png(const Picture& picture, const PngText& text) {
    constexpr std::int64_t most = 1 << 24;
    if (picture.width < 1 || picture.height < 1 || picture.width > most || picture.height > most ||
        static_cast<std::int64_t>(picture.rgb.size()) != 3 * picture.width * picture.height) {
        throw Error(ErrorCode::usage, "A picture of " + std::to_string(picture.width) + " x " +
                                          std::to_string(picture.height) +
                                          " pixels does not have " +
                                          std::to_string(picture.rgb.size()) +
                                          " bytes of RGB. Give 3 bytes a pixel.");
    }
    Encoder encoder(picture);
    for (const auto& [keyword, value] : text) encoder.chunks.push_back(text_chunk(keyword, value));
    encoder.png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, stop, ignore);
    if (encoder.png) encoder.info = png_create_info_struct(encoder.png);
    if (!encoder.info) throw std::bad_alloc();
    if (!succeeds(encoder)) {
        if (encoder.full) throw std::bad_alloc();
        throw Error(ErrorCode::usage, "A picture of " + std::to_string(picture.width) + " x " +
                                          std::to_string(picture.height) +
                                          " pixels is too large for a PNG.");
    }
    return std::move(encoder.bytes);
}

void write_png(const std::filesystem::path& path, const Picture& picture, const PngText& text) {
    if (!is_png_name(path)) {
        throw Error(ErrorCode::usage,
                    path.string() +
                        " is no name for a picture: only PNG files are written, since they carry "
                        "the prompt and the seed. End the name in .png.");
    }
    const std::string bytes = encode_png(picture, text);
    try {
        write_whole(path, bytes);
    } catch (const DiskError& error) {
        throw Error(ErrorCode::internal, "Cannot write " + path.string() + ": " + error.what() +
                                             ". Choose a folder that exists and can be written, "
                                             "with room for the picture.");
    }
}

}  // namespace fluxdeploy
