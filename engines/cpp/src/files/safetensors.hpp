// Safetensors files: headers of untrusted files, and one tensor's values at a time.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace fluxdeploy {

// A tensor of a file: `offset` counts bytes from the start of the file.
struct TensorEntry {
    std::string name;
    std::string dtype;  // as the file has it: "F32", "I32", "BF16", ...
    std::vector<std::int64_t> shape;
    std::int64_t offset = 0;
    std::int64_t nbytes = 0;
};

// A file whose header was read and found to describe exactly the bytes that follow it.
struct TensorFile {
    std::filesystem::path path;
    std::map<std::string, TensorEntry> tensors;
    std::map<std::string, std::string> metadata;

    // The tensor `name`. Raises `Error` (bundle) for an unknown one.
    const TensorEntry& entry(const std::string& name) const;
};

// The header of a safetensors file; its data is never read. Raises `Error` (bundle) for a file that
// is missing, truncated, or whose header does not describe exactly the bytes that follow it.
TensorFile read_header(const std::filesystem::path& path);

// One tensor's bytes as stored, little-endian. Raises `Error` (bundle) for an unknown name, and for
// a file that was cut off since its header was read.
std::vector<std::uint8_t> read_bytes(const TensorFile& file, const std::string& name);

// One tensor's values, row-major, exactly: of F32, F16 or BF16. Raises `Error` (bundle) for others,
// and as `read_bytes` does.
std::vector<float> read_float32(const TensorFile& file, const std::string& name);

// One tensor's values, row-major: of I32. Raises `Error` (bundle) as `read_float32` does.
std::vector<std::int32_t> read_int32(const TensorFile& file, const std::string& name);

}  // namespace fluxdeploy
