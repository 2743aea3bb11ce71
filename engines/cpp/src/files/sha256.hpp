// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace fluxdeploy {

// A hash that is given bytes piece by piece.
class Sha256 {
public:
    void update(const void* data, std::size_t size);

    // The hash of all bytes so far, as 64 lower-case hex digits. Nothing may be added after it.
    std::string hex();

private:
    void block(const std::uint8_t* bytes);

    std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<std::uint8_t, 64> pending_{};
    std::uint64_t size_ = 0;
};

// The hash of some bytes.
std::string sha256(const std::string& bytes);

}  // namespace fluxdeploy
