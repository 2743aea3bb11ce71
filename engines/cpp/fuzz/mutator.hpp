// Damages files: their bytes, the values of their JSON, and what checks them, set right again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace fluxdeploy::fuzz {

// The same number gives the same damage everywhere.
class Mutator {
public:
    explicit Mutator(std::uint64_t number) : random_(number) {}

    // One to four places of one of the seeds damaged, as bytes or as JSON.
    std::string text(const std::vector<std::string>& seeds);

    // The same of a safetensors file; often its header's length fits again.
    std::string safetensors(const std::vector<std::string>& seeds);

    // The same of a PNG; often its chunks' checksums fit again.
    std::string png(const std::vector<std::string>& seeds);

private:
    std::size_t below(std::size_t count);
    template <class List>
    const auto& one_of(const List& list) {
        return list[below(std::size(list))];
    }

    void damage_bytes(std::string& data, const std::vector<std::string>& seeds);
    void damage_value(std::string& data);
    std::string damaged(const std::vector<std::string>& seeds, bool json);

    std::mt19937_64 random_;
};

}  // namespace fluxdeploy::fuzz
