// Files of the disk: reading regular ones within bounds, hashing, writing whole, errors in words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>

#include "files/bundle.hpp"

namespace fluxdeploy {

// Why a file cannot be read or written. `code()` is the system's, or 0 where it is no error of it.
class DiskError : public std::runtime_error {
public:
    DiskError(int code, const std::string& reason) : std::runtime_error(reason), code_(code) {}
    // With the system's own words for `code`.
    explicit DiskError(int code);

    int code() const noexcept { return code_; }
    // Whether there is no such file, or a part of its path is none.
    bool is_missing() const noexcept;
    // What to do about it, where that is known; else the reason.
    std::string words() const;

private:
    int code_;
};

// A regular file that is open for reading. Links are followed; a pipe's writer is never waited for.
class RegularFile {
public:
    // Raises `DiskError` for a file that cannot be opened or is of another kind.
    explicit RegularFile(const std::filesystem::path& path);
    ~RegularFile();
    RegularFile(const RegularFile&) = delete;
    RegularFile& operator=(const RegularFile&) = delete;

    // Bytes of the file as it is now.
    std::int64_t size() const;
    // Up to `size` bytes from where the last read ended; fewer only at the file's end. Raises
    // `DiskError`.
    std::size_t read(void* data, std::size_t size);
    void seek(std::int64_t offset);

private:
    int descriptor_;
};

// All bytes of a regular file that has at most `limit` of them. Raises `DiskError`.
std::string read_whole(const std::filesystem::path& path, std::int64_t limit);

// The SHA-256 of a regular file as 64 hex digits. Raises `DiskError`.
std::string sha256_file(const std::filesystem::path& path);

// That of the file that `path` leads to. Raises `DiskError`.
FileIdentity identity_of(const std::filesystem::path& path);

// Write a file so that it is there whole or not at all. Raises `DiskError`.
void write_whole(const std::filesystem::path& path, const std::string& bytes);

// Raise `Error` (bundle): "Cannot read <path>: <why>."
[[noreturn]] void cannot_read(const std::filesystem::path& path, const DiskError& error);

}  // namespace fluxdeploy
