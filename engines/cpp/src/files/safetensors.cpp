#include "files/safetensors.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "errors.hpp"
#include "files/disk.hpp"
#include "files/json.hpp"
#include "files/words.hpp"

namespace fluxdeploy {
namespace {

// A FLUX.1 with everything in one file has 0.3 MiB.
constexpr std::int64_t kMaxHeader = 16 << 20;
constexpr std::size_t kMaxValues = 100'000;
constexpr std::size_t kMaxAxes = 32;
constexpr const char* kMetadata = "__metadata__";

// Every dtype of the format and its bits per element.
const std::map<std::string, int>& bits_of_dtypes() {
    static const std::map<std::string, int> bits{
        {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
        {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
        {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
        {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
        {"I64", 64},        {"U64", 64}};
    return bits;
}

// What is wrong with a header, to be completed with the file's name. It may quote the header,
// which may be one long name or list.
class HeaderError : public std::runtime_error {
public:
    explicit HeaderError(const std::string& problem) : std::runtime_error(shortened(problem)) {}
};

std::string text(std::int64_t value) { return std::to_string(value); }

// Sizes, or positions: none where the value is no list of whole numbers that are not negative.
bool read_sizes(const Json* json, std::vector<std::int64_t>& sizes) {
    const auto* list = json ? json->as<Json::Array>() : nullptr;
    if (!list) return false;
    for (const auto& entry : *list) {
        const auto* size = entry.as<std::int64_t>();
        if (!size || *size < 0) return false;
        sizes.push_back(*size);
    }
    return true;
}

std::string shown(const Json* json) { return json ? json->text() : "nothing"; }

std::int64_t tensor_bytes(const TensorEntry& entry, int bits) {
    if (entry.shape.size() > kMaxAxes) {
        throw HeaderError("the tensor " + in_quotes(entry.name) + " has " +
                          std::to_string(entry.shape.size()) + " axes, and at most " +
                          std::to_string(kMaxAxes) + " are allowed");
    }
    // Sizes past 63 bits are refused even where another size is 0.
    std::int64_t most = std::numeric_limits<std::int64_t>::max() / bits;
    std::int64_t elements = 1;
    for (const std::int64_t size : entry.shape) {
        const std::int64_t factor = std::max<std::int64_t>(size, 1);
        if (factor > most) {
            throw HeaderError("the tensor " + in_quotes(entry.name) +
                              " has a shape that is too large");
        }
        most /= factor;
        elements *= size;
    }
    if (elements * bits % 8 != 0) {
        throw HeaderError("the tensor " + in_quotes(entry.name) + " of dtype " + entry.dtype +
                          " does not fill whole bytes");
    }
    return elements * bits / 8;
}

TensorEntry parse_entry(const std::string& name, const Json& json, std::int64_t data_start) {
    const std::string tensor = "the tensor " + in_quotes(name);
    if (!json.as<Json::Object>()) throw HeaderError("its header has no object for " + tensor);
    const Json* dtype = json.find("dtype");
    const auto* known = dtype ? dtype->as<std::string>() : nullptr;
    const auto bits = known ? bits_of_dtypes().find(*known) : bits_of_dtypes().end();
    if (bits == bits_of_dtypes().end()) {
        throw HeaderError(tensor + " has the unknown dtype " + shown(dtype));
    }
    TensorEntry entry;
    entry.name = name;
    entry.dtype = *known;
    if (!read_sizes(json.find("shape"), entry.shape)) {
        throw HeaderError(tensor + " has the shape " + shown(json.find("shape")) +
                          ", not a list of sizes");
    }
    std::vector<std::int64_t> offsets;
    if (!read_sizes(json.find("data_offsets"), offsets) || offsets.size() != 2) {
        throw HeaderError(tensor + " has the offsets " + shown(json.find("data_offsets")) +
                          ", not two positions");
    }
    if (offsets[0] > offsets[1]) {
        throw HeaderError(tensor + " ends at byte " + text(offsets[1]) + ", before its start at " +
                          text(offsets[0]));
    }
    entry.nbytes = tensor_bytes(entry, bits->second);
    if (offsets[1] - offsets[0] != entry.nbytes) {
        throw HeaderError(tensor + " of dtype " + entry.dtype + " and shape " +
                          shown(json.find("shape")) + " takes " + text(entry.nbytes) +
                          " bytes, and its offsets give it " + text(offsets[1] - offsets[0]));
    }
    if (offsets[1] > std::numeric_limits<std::int64_t>::max() - data_start) {
        throw HeaderError(tensor + " has a shape that is too large");
    }
    entry.offset = data_start + offsets[0];
    return entry;
}

// Refuse tensors that do not lie one after the other from the start of the data to its end.
void check_order(std::vector<TensorEntry>& entries, std::int64_t data_start,
                 std::int64_t data_size) {
    // The header may list tensors in any order; an empty one lies before the next with bytes.
    std::sort(entries.begin(), entries.end(), [](const TensorEntry& a, const TensorEntry& b) {
        return std::pair{a.offset, a.nbytes} < std::pair{b.offset, b.nbytes};
    });
    std::int64_t end = data_start;
    for (const auto& entry : entries) {
        if (entry.offset != end) {
            const char* relation =
                entry.offset < end ? "overlaps the one before it" : "leaves a gap";
            throw HeaderError("the tensor " + in_quotes(entry.name) + " " + relation +
                              ": it starts at byte " + text(entry.offset - data_start) +
                              " of the data instead of " + text(end - data_start));
        }
        end += entry.nbytes;
    }
    if (end - data_start != data_size) {
        throw HeaderError("it has " + text(data_size) +
                          " bytes of tensor data, and its header promises " +
                          text(end - data_start));
    }
}

void parse_metadata(const Json& json, std::map<std::string, std::string>& metadata) {
    const auto* members = json.as<Json::Object>();
    bool strings = members != nullptr;
    if (strings) {
        for (const auto& member : *members) {
            const auto* value = member.value.as<std::string>();
            strings = strings && value;
            if (value) metadata[member.key] = *value;
        }
    }
    if (!strings) {
        throw HeaderError(std::string("its ") + kMetadata + " is not an object of strings");
    }
}

void parse_header(const std::string& header, std::int64_t data_start, std::int64_t data_size,
                  TensorFile& file) {
    if (header.compare(0, 1, "{") != 0) throw HeaderError("its header does not start with a brace");
    Json json{nullptr};
    try {
        json = parse_json(header, kMaxValues);
    } catch (const JsonError& error) {
        throw HeaderError(std::string("its header is not valid JSON (") + error.what() + ")");
    }
    std::vector<TensorEntry> entries;
    for (const auto& member : std::get<Json::Object>(json.value)) {
        if (member.key == kMetadata) {
            parse_metadata(member.value, file.metadata);
        } else {
            entries.push_back(parse_entry(member.key, member.value, data_start));
        }
    }
    check_order(entries, data_start, data_size);
    for (auto& entry : entries) file.tensors.emplace(entry.name, entry);
}

std::int64_t little_endian(const unsigned char* bytes) {
    std::uint64_t value = 0;
    for (int i = 7; i >= 0; --i) value = value << 8 | bytes[i];
    const auto most = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    return static_cast<std::int64_t>(std::min(value, most));
}

void read_file(const std::filesystem::path& path, TensorFile& file) {
    RegularFile reader(path);
    const std::int64_t size = reader.size();
    unsigned char start[8];
    const std::size_t count = reader.read(start, sizeof start);
    if (count < sizeof start) {
        throw HeaderError("it has " + std::to_string(count) +
                          " bytes, and the header's length alone takes 8");
    }
    const std::int64_t length = little_endian(start);
    if (length > kMaxHeader) {
        throw HeaderError("its header would have " + text(length) + " bytes, and at most " +
                          text(kMaxHeader) + " are allowed");
    }
    if (8 + length > size) {
        throw HeaderError("it has " + text(size) + " bytes, and its header alone would end at " +
                          text(8 + length));
    }
    std::string header(static_cast<std::size_t>(length), '\0');
    if (reader.read(header.data(), header.size()) != header.size()) {
        throw HeaderError("it was cut off while it was read");
    }
    parse_header(header, 8 + length, size - 8 - length, file);
}

template <class Number>
std::vector<Number> numbers(const std::vector<std::uint8_t>& bytes) {
    std::vector<Number> result(bytes.size() / sizeof(Number));
    if (!result.empty()) std::memcpy(result.data(), bytes.data(), bytes.size());
    return result;
}

float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// An IEEE half's value.
float from_half(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
    const std::uint32_t exponent = half >> 10 & 31;
    const std::uint32_t fraction = half & 0x3FF;
    if (exponent == 31) return from_bits(sign | 0x7F800000 | fraction << 13);
    if (exponent > 0) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    // Subnormals are in steps of 2^-24.
    const float value = static_cast<float>(fraction) * 0x1p-24F;
    return sign ? -value : value;
}

[[noreturn]] void refuse_dtype(const TensorFile& file, const TensorEntry& entry,
                               const char* allowed) {
    throw Error(ErrorCode::bundle, "The tensor " + in_quotes(entry.name) + " of " +
                                       file.path.string() + " has the dtype " + entry.dtype +
                                       "; it must be " + allowed +
                                       ". Build the bundle again with `fluxdeploy build`.");
}

}  // namespace

const TensorEntry& TensorFile::entry(const std::string& name) const {
    const auto found = tensors.find(name);
    if (found == tensors.end()) {
        throw Error(ErrorCode::bundle, path.string() + " has no tensor named " + in_quotes(name) +
                                           "; see its header.");
    }
    return found->second;
}

TensorFile read_header(const std::filesystem::path& path) {
    TensorFile file;
    file.path = path;
    try {
        read_file(path, file);
    } catch (const DiskError& error) {
        throw Error(ErrorCode::bundle, "Cannot read " + path.string() + ": " + error.what() +
                                           ". Name a .safetensors file.");
    } catch (const HeaderError& error) {
        throw Error(ErrorCode::bundle, path.string() + " is not a whole safetensors file: " +
                                           error.what() + ". Download or export it again.");
    }
    return file;
}

std::vector<std::uint8_t> read_bytes(const TensorFile& file, const std::string& name) {
    const TensorEntry& entry = file.entry(name);
    try {
        RegularFile reader(file.path);
        // Asked before room is made for bytes that are no longer there.
        if (reader.size() >= entry.offset + entry.nbytes) {
            std::vector<std::uint8_t> bytes(static_cast<std::size_t>(entry.nbytes));
            reader.seek(entry.offset);
            if (reader.read(bytes.data(), bytes.size()) == bytes.size()) return bytes;
        }
    } catch (const DiskError& error) {
        cannot_read(file.path, error);
    }
    throw Error(ErrorCode::bundle, file.path.string() + " was cut off: the tensor " +
                                       in_quotes(name) + " is not whole.");
}

std::vector<float> read_float32(const TensorFile& file, const std::string& name) {
    const TensorEntry& entry = file.entry(name);
    if (entry.dtype == "F32") return numbers<float>(read_bytes(file, name));
    if (entry.dtype != "F16" && entry.dtype != "BF16")
        refuse_dtype(file, entry, "F32, F16 or BF16");
    const auto stored = numbers<std::uint16_t>(read_bytes(file, name));
    std::vector<float> values(stored.size());
    const bool half = entry.dtype == "F16";
    std::transform(stored.begin(), stored.end(), values.begin(), [half](std::uint16_t bits) {
        return half ? from_half(bits) : from_bits(static_cast<std::uint32_t>(bits) << 16);
    });
    return values;
}

std::vector<std::int32_t> read_int32(const TensorFile& file, const std::string& name) {
    const TensorEntry& entry = file.entry(name);
    if (entry.dtype != "I32") refuse_dtype(file, entry, "I32");
    return numbers<std::int32_t>(read_bytes(file, name));
}

}  // namespace fluxdeploy
