#include "files/bundle.hpp"

#include <future>
#include <numeric>

#include "errors.hpp"
#include "files/disk.hpp"
#include "files/sha256.hpp"
#include "files/words.hpp"
#include "side_by_side.hpp"

namespace fluxdeploy {
namespace {

namespace fs = std::filesystem;

// Bytes of a file up to which opening a bundle hashes it.
constexpr std::int64_t kSmall = 64 << 20;
// Threads that hash, at most.
constexpr std::size_t kHashers = 4;
// How often a bundle may be replaced while it is opened.
constexpr int kSwaps = 3;
constexpr const char* kRebuild = " Build the bundle again with `fluxdeploy build`.";

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::bundle, message); }

// `path` with all links followed, also one that leads to nothing.
fs::path real(const fs::path& path) {
    std::error_code error;
    const bool dangling = fs::is_symlink(path, error) && !fs::exists(path, error) && !error;
    fs::path result = fs::weakly_canonical(
        dangling ? path.parent_path() / fs::read_symlink(path, error) : path, error);
    if (error) cannot_read(path, DiskError(error.value()));
    return result;
}

bool is_inside(const fs::path& root, const fs::path& path) {
    auto part = path.begin();
    for (const auto& wanted : root) {
        if (part == path.end() || *part != wanted) return false;
        ++part;
    }
    return true;
}

// Refuse a file that lies elsewhere: runtimes read no weights from outside a graph's folder.
void check_inside(const fs::path& root, const fs::path& path) {
    const fs::path target = real(path);
    if (is_inside(root, target)) return;
    refuse(path.string() + " is a link that leaves the bundle, to " + target.string() +
           ", as in the cache of a hub. Copy the files themselves, with `cp -rL " + root.string() +
           " NEW_FOLDER` or with `hf download --local-dir NEW_FOLDER`, and open "
           "the copy.");
}

FileIdentity check_size(const fs::path& root, const FileRecord& record) {
    const fs::path path = root / record.path;
    check_inside(root, path);
    std::error_code error;
    if (!fs::is_regular_file(path, error)) refuse(path.string() + " is missing." + kRebuild);
    try {
        const FileIdentity identity = identity_of(path);
        if (identity.size != record.size) {
            refuse(path.string() + " has " + std::to_string(identity.size) +
                   " bytes, and the manifest says " + std::to_string(record.size) + "." + kRebuild);
        }
        return identity;
    } catch (const DiskError& problem) {
        cannot_read(path, problem);
    }
}

std::string hash_of(const fs::path& path) {
    try {
        return sha256_file(path);
    } catch (const DiskError& error) {
        cannot_read(path, error);
    }
}

// Hold each file against its SHA-256, several at a time: a disk gives bytes faster than a thread
// hashes them. Of what is wrong the first is told.
void check_hashes(const std::vector<std::pair<fs::path, std::string>>& wanted) {
    std::vector<std::string> found(wanted.size());
    std::vector<std::size_t> order(wanted.size());
    std::iota(order.begin(), order.end(), 0);
    side_by_side(order, kHashers, [&](std::size_t i) { found[i] = hash_of(wanted[i].first); });
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        if (found[i] == wanted[i].second) continue;
        refuse(wanted[i].first.string() + " was changed: its SHA-256 is not the manifest's." +
               kRebuild);
    }
}

// The SHA-256 of the manifest that lies at `root` now, empty where there is none.
std::string manifest_hash(const fs::path& root) {
    try {
        return sha256(read_manifest_text(root));
    } catch (const Error&) {
        return "";
    }
}

// The recorded files that opening hashes, and their hashes.
std::vector<std::pair<fs::path, std::string>> hashed(const Bundle& bundle) {
    std::vector<std::pair<fs::path, std::string>> wanted;
    for (const auto& [path, record] : bundle.manifest.files()) {
        if (record.size <= kSmall) wanted.emplace_back(bundle.root / path, record.sha256);
    }
    return wanted;
}

Bundle open_once(const fs::path& root, const std::string& text,
                 const std::function<void(const Bundle&)>& meanwhile) {
    Bundle bundle;
    bundle.root = root;
    bundle.content_hash = sha256(text);
    bundle.manifest = parse_manifest(text, (root / kManifestName).string());
    check_inside(root, root / kManifestName);
    for (const auto& [path, record] : bundle.manifest.files()) {
        bundle.seen[path] = check_size(root, record);
    }
    std::future<void> other;
    if (meanwhile) other = std::async(std::launch::async, [&] { meanwhile(bundle); });
    check_hashes(hashed(bundle));
    if (meanwhile) other.get();
    return bundle;
}

[[noreturn]] void refuse_another(const fs::path& root, const fs::path& path) {
    refuse("The bundle " + root.string() + " was replaced or changed since it was opened, since " +
           path.string() + " is another file now; open it again.");
}

bool is_seen(const Bundle& bundle, const FileRecord& record, const fs::path& path) {
    const auto seen = bundle.seen.find(record.path);
    if (seen == bundle.seen.end()) return false;
    try {
        const FileIdentity now = identity_of(path);
        if (now == seen->second) return true;
        // A build may have linked the file or put the same there again, or somebody has written it
        // and set its time back. Large files are not hashed on opening either.
        if (record.size > kSmall) return now.may_equal(seen->second);
        return now.size == record.size && sha256_file(path) == record.sha256;
    } catch (const DiskError&) {
        return false;
    }
}

}  // namespace

bool FileIdentity::operator==(const FileIdentity& other) const {
    return may_equal(other) && changed == other.changed;
}

bool FileIdentity::may_equal(const FileIdentity& other) const {
    return device == other.device && inode == other.inode && size == other.size &&
           modified == other.modified;
}

fs::path Bundle::path(const std::string& relative) const {
    const std::string problem = path_problem(relative);
    if (!problem.empty()) {
        refuse(root.string() + " has no file " + in_quotes(relative) + ": the path " + problem +
               ".");
    }
    return root / relative;
}

Bundle open_bundle(const fs::path& path, const std::function<void(const Bundle&)>& meanwhile) {
    const fs::path root = real(path);
    for (int i = 0; i < kSwaps; ++i) {
        const std::string text = read_manifest_text(root);
        const std::string hash = sha256(text);
        try {
            Bundle bundle = open_once(root, text, meanwhile);
            if (manifest_hash(root) == hash) return bundle;
        } catch (const Error&) {
            if (manifest_hash(root) == hash) throw;
        }
        // A build has put another bundle there meanwhile.
    }
    refuse("The bundle " + root.string() + " is replaced again and again; open it when that ends.");
}

void require_unchanged(const Bundle& bundle, const std::vector<FileRecord>& records) {
    if (manifest_hash(bundle.root) != bundle.content_hash) {
        refuse_another(bundle.root, bundle.root / kManifestName);
    }
    for (const auto& record : records) {
        const fs::path path = bundle.path(record.path);
        if (!is_seen(bundle, record, path)) refuse_another(bundle.root, path);
    }
}

std::string read_recorded(const Bundle& bundle, const FileRecord& record) {
    const fs::path path = bundle.path(record.path);
    if (record.size > kSmall) {
        refuse(path.string() + " has " + std::to_string(record.size) +
               " bytes, and a file of its kind has at most " + std::to_string(kSmall) + "." +
               kRebuild);
    }
    require_unchanged(bundle, {record});
    try {
        std::string data = read_whole(path, kSmall);
        if (sha256(data) != record.sha256) refuse_another(bundle.root, path);
        return data;
    } catch (const DiskError& error) {
        cannot_read(path, error);
    }
}

}  // namespace fluxdeploy
