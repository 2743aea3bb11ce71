// A bundle that was opened: its manifest, and its files as they were then.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "files/manifest.hpp"

namespace fluxdeploy {

// Which file it is, and when it was changed: of one file, an equal identity is equal bytes.
// Times are in nanoseconds.
struct FileIdentity {
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
    std::int64_t size = 0;
    std::int64_t modified = 0;
    std::int64_t changed = 0;

    bool operator==(const FileIdentity& other) const;

    // Whether it can be the same file with the same bytes: linking and a change of permissions
    // move `changed` too.
    bool may_equal(const FileIdentity& other) const;
};

// An opened bundle. `content_hash` is the SHA-256 of the manifest's bytes, as 64 hex digits: the
// bundle hash. `seen` are the recorded files by their path in the manifest.
struct Bundle {
    std::filesystem::path root;
    Manifest manifest;
    std::string content_hash;
    std::map<std::string, FileIdentity> seen;

    // Where the file that the manifest calls `relative` lies. Raises `Error` (bundle) for a path
    // that is not relative to the bundle or leaves it.
    std::filesystem::path path(const std::string& relative) const;
};

// Read a bundle's manifest and check every file that it records: a regular one, inside `path` when
// links are followed, of the recorded size, and, up to 64 MiB, of the recorded SHA-256. A link in
// place of the folder is followed now and not later. Raises `Error` (bundle), naming the file.
//
// `meanwhile` is given the bundle while its files are hashed. What it raises comes after what is
// wrong with them; it is called again where another bundle has come to the place.
Bundle open_bundle(const std::filesystem::path& path,
                   const std::function<void(const Bundle&)>& meanwhile = {});

// Raise `Error` (bundle) where the manifest, or one of `records`, is not what was opened. Call it
// before and after a library opens files of the bundle by their path.
void require_unchanged(const Bundle& bundle, const std::vector<FileRecord>& records);

// The bytes of a recorded file, which are those that its SHA-256 is of. Raises `Error` (bundle)
// for other bytes, and for a file of more than 64 MiB.
std::string read_recorded(const Bundle& bundle, const FileRecord& record);

}  // namespace fluxdeploy
