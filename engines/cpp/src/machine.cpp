#include "machine.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

namespace fluxdeploy {
namespace {

namespace fs = std::filesystem;

constexpr const char* kControlGroups = "/sys/fs/cgroup";

std::optional<std::int64_t> number(const std::string& text) {
    const bool digits = !text.empty() && text.size() <= 18 &&
                        text.find_first_not_of("0123456789") == std::string::npos;
    return digits ? std::optional<std::int64_t>(std::stoll(text)) : std::nullopt;
}

// The number that a file holds: nothing where there is none, or "max".
std::optional<std::int64_t> read_size(const fs::path& path) {
    std::ifstream file(path);
    std::string text;
    file >> text;
    return number(text);
}

// The size of that name in a file of the kernel, one a line, in bytes.
std::optional<std::int64_t> read_size(const fs::path& path, const std::string& name) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string found, value, unit;
        words >> found >> value >> unit;
        if (found != name && found != name + ":") continue;
        const auto size = number(value);
        return size && unit == "kB" ? *size * 1024 : size;
    }
    return std::nullopt;
}

// What a control group leaves, in version 2; nothing where it has no limit.
std::optional<std::int64_t> left_in(const fs::path& group) {
    const auto limit = read_size(group / "memory.max");
    if (!limit) return std::nullopt;
    // Pages of files that nobody has used for long are freed where they are in the way.
    const std::int64_t kept = read_size(group / "memory.stat", "inactive_file").value_or(0);
    const std::int64_t used = read_size(group / "memory.current").value_or(0) - kept;
    return std::max<std::int64_t>(*limit - used, 0);
}

// The folder of this process's control group; inside a container the outermost one is the
// container's own. Empty where there is none.
fs::path control_group() {
    std::ifstream file("/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {
        if (line.rfind("0::/", 0) == 0) return fs::path(kControlGroups) / line.substr(4);
    }
    return {};
}

}  // namespace

std::optional<std::int64_t> available_memory() {
    std::optional<std::int64_t> least = read_size("/proc/meminfo", "MemAvailable");
    for (fs::path group = control_group(); group.string().rfind(kControlGroups, 0) == 0;
         group = group.parent_path()) {
        const auto left = left_in(group);
        if (left && (!least || *left < *least)) least = left;
    }
    return least;
}

}  // namespace fluxdeploy
