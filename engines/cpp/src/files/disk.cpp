#include "files/disk.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <vector>

#include "errors.hpp"
#include "files/sha256.hpp"

namespace fluxdeploy {
namespace {

constexpr std::size_t kChunk = 1 << 20;
// Another file may take the name after it was looked at; these make opening harmless then.
constexpr int kReadFlags = O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY;

const char* advice(int code) {
    switch (code) {
        case ENOSPC:
            return "the disk is full; free some space and run the command again";
        case EDQUOT:
            return "your disk quota is used up; free some space and run the command again";
        case EACCES:
            return "permission is denied; choose another folder or change its permissions";
        case EPERM:
            return "the system does not permit it; choose another folder or change its permissions";
        case EROFS:
            return "the file system is read-only; choose a folder on another one";
        case ENOENT:
            return "there is no such file or folder; check the path";
        case ENOTDIR:
            return "a part of this path is a file, not a folder; choose another path";
        case EEXIST:
            return "a file is in its place; choose another path";
        case EISDIR:
            return "it is a folder, not a file; choose another path";
        case ENAMETOOLONG:
            return "the name is too long for the file system; choose a shorter path";
        case ELOOP:
            return "its symbolic links lead in a circle; choose another path";
        case EFBIG:
            return "the file is larger than the file system allows; choose a folder on another one";
        case EIO:
            return "the disk reported a read or write error; check the disk";
        case EBUSY:
            return "it is in use by the system; choose another path";
        case EMFILE:
            return "too many files are open; raise the limit with `ulimit -n`";
        default:
            return nullptr;
    }
}

void check_regular(const struct stat& status) {
    const mode_t mode = status.st_mode;
    if (S_ISREG(mode)) return;
    if (S_ISDIR(mode)) throw DiskError(EISDIR, "it is a folder, not a regular file");
    const char* kind = S_ISFIFO(mode)                   ? "a named pipe"
                       : S_ISSOCK(mode)                 ? "a socket"
                       : S_ISCHR(mode) || S_ISBLK(mode) ? "a device"
                                                        : "of an unknown kind";
    throw DiskError(0, std::string("it is ") + kind + ", not a regular file");
}

struct stat status_of(const std::filesystem::path& path) {
    struct stat status{};
    if (::stat(path.c_str(), &status) != 0) throw DiskError(errno);
    return status;
}

std::int64_t nanoseconds(const struct timespec& time) {
    return static_cast<std::int64_t>(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

// A file that is written beside the one it will become, and goes where it does not.
class Replacement {
public:
    explicit Replacement(std::filesystem::path target) : target_(std::move(target)) {
        static std::atomic<unsigned> next{0};
        temporary_ = target_;
        temporary_.replace_filename(".tmp-" + std::to_string(::getpid()) + "-" +
                                    std::to_string(next++));
        descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (descriptor_ < 0) throw DiskError(errno);
    }

    ~Replacement() {
        if (descriptor_ >= 0) ::close(descriptor_);
        if (!done_) ::unlink(temporary_.c_str());
    }

    Replacement(const Replacement&) = delete;
    Replacement& operator=(const Replacement&) = delete;

    void write(const std::string& bytes) {
        for (std::size_t at = 0; at < bytes.size();) {
            const ssize_t count = ::write(descriptor_, bytes.data() + at, bytes.size() - at);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) throw DiskError(errno);
            at += static_cast<std::size_t>(count);
        }
    }

    void finish() {
        if (::fsync(descriptor_) != 0) throw DiskError(errno);
        const int closed = ::close(descriptor_);
        descriptor_ = -1;
        if (closed != 0) throw DiskError(errno);
        if (::rename(temporary_.c_str(), target_.c_str()) != 0) throw DiskError(errno);
        done_ = true;
    }

private:
    std::filesystem::path target_;
    std::filesystem::path temporary_;
    int descriptor_ = -1;
    bool done_ = false;
};

}  // namespace

// `generic_category` has words for each number without the shared buffer of `strerror`.
DiskError::DiskError(int code) : DiskError(code, std::generic_category().message(code)) {}

bool DiskError::is_missing() const noexcept { return code_ == ENOENT || code_ == ENOTDIR; }

std::string DiskError::words() const {
    const char* known = advice(code_);
    return known ? known : what();
}

RegularFile::RegularFile(const std::filesystem::path& path) {
    // Asked before opening: that alone waits for a pipe's writer, or does something to a device.
    check_regular(status_of(path));
    descriptor_ = ::open(path.c_str(), kReadFlags);
    if (descriptor_ < 0) throw DiskError(errno);
    try {
        struct stat status{};
        if (::fstat(descriptor_, &status) != 0) throw DiskError(errno);
        check_regular(status);
    } catch (...) {
        ::close(descriptor_);
        throw;
    }
}

RegularFile::~RegularFile() { ::close(descriptor_); }

std::int64_t RegularFile::size() const {
    struct stat status{};
    if (::fstat(descriptor_, &status) != 0) throw DiskError(errno);
    return status.st_size;
}

std::size_t RegularFile::read(void* data, std::size_t size) {
    std::size_t done = 0;
    while (done < size) {
        const ssize_t count = ::read(descriptor_, static_cast<char*>(data) + done, size - done);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) throw DiskError(errno);
        if (count == 0) break;
        done += static_cast<std::size_t>(count);
    }
    return done;
}

void RegularFile::seek(std::int64_t offset) {
    if (::lseek(descriptor_, offset, SEEK_SET) < 0) throw DiskError(errno);
}

std::string read_whole(const std::filesystem::path& path, std::int64_t limit) {
    RegularFile file(path);
    const std::int64_t size = file.size();
    if (size > limit) {
        throw DiskError(0, "it has " + std::to_string(size) + " bytes, and at most " +
                               std::to_string(limit) + " are allowed");
    }
    // One byte more than the system says: the file may grow, or be of /proc, whose sizes are 0.
    std::string data;
    const auto most = static_cast<std::size_t>(limit) + 1;
    for (auto wanted = static_cast<std::size_t>(size) + 1; data.size() < most;
         wanted = data.size() + kChunk) {
        const std::size_t before = data.size();
        data.resize(std::min(wanted, most));
        const std::size_t count = file.read(data.data() + before, data.size() - before);
        const bool ended = count < data.size() - before;
        data.resize(before + count);
        if (ended) return data;
    }
    throw DiskError(0, "it has more than the " + std::to_string(limit) + " bytes that are allowed");
}

std::string sha256_file(const std::filesystem::path& path) {
    RegularFile file(path);
    Sha256 hash;
    std::vector<char> chunk(kChunk);
    while (const std::size_t count = file.read(chunk.data(), chunk.size())) {
        hash.update(chunk.data(), count);
    }
    return hash.hex();
}

FileIdentity identity_of(const std::filesystem::path& path) {
    const struct stat status = status_of(path);
    FileIdentity identity;
    identity.device = status.st_dev;
    identity.inode = status.st_ino;
    identity.size = status.st_size;
    identity.modified = nanoseconds(status.st_mtim);
    identity.changed = nanoseconds(status.st_ctim);
    return identity;
}

void write_whole(const std::filesystem::path& path, const std::string& bytes) {
    Replacement file(path);
    file.write(bytes);
    file.finish();
}

void cannot_read(const std::filesystem::path& path, const DiskError& error) {
    throw Error(ErrorCode::bundle, "Cannot read " + path.string() + ": " + error.words() + ".");
}

}  // namespace fluxdeploy
