#include "files/sha256.hpp"

#include <algorithm>
#include <utility>

namespace fluxdeploy {
namespace {

constexpr std::uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t rotated(std::uint32_t word, int bits) { return word >> bits | word << (32 - bits); }

// Round number `Round` of eight: what the standard moves along a..h stays in its place here, and
// the letters go round.
template <int Round>
void mix(std::uint32_t (&state)[8], std::uint32_t added) {
    const auto letter = [&](int n) -> std::uint32_t& { return state[(8 + n - Round) % 8]; };
    const std::uint32_t a = letter(0), b = letter(1), c = letter(2), e = letter(4), f = letter(5);
    const std::uint32_t g = letter(6);
    const std::uint32_t t1 =
        letter(7) + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + (g ^ (e & (f ^ g))) + added;
    letter(3) += t1;
    letter(7) = t1 + (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) | (c & (a | b)));
}

template <int... Rounds>
void mix_all(std::uint32_t (&state)[8], const std::uint32_t* added,
             std::integer_sequence<int, Rounds...>) {
    (mix<Rounds>(state, added[Rounds]), ...);
}

}  // namespace

void Sha256::update(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::uint8_t*>(data);
    std::size_t used = size_ % 64;
    size_ += size;
    if (used > 0) {
        const std::size_t count = std::min(size, 64 - used);
        std::copy_n(bytes, count, pending_.data() + used);
        bytes += count;
        size -= count;
        if (used + count < 64) return;
        block(pending_.data());
    }
    for (; size >= 64; bytes += 64, size -= 64) block(bytes);
    std::copy_n(bytes, size, pending_.data());
}

std::string Sha256::hex() {
    const std::uint64_t bits = size_ * 8;
    const std::uint8_t one = 0x80;
    const std::uint8_t zeros[64] = {};
    update(&one, 1);
    update(zeros, (64 + 56 - size_ % 64) % 64);
    std::uint8_t length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<std::uint8_t>(bits >> (56 - 8 * i));
    update(length, 8);
    std::string result;
    for (const std::uint32_t word : state_) {
        for (int shift = 28; shift >= 0; shift -= 4)
            result += "0123456789abcdef"[word >> shift & 15];
    }
    return result;
}

void Sha256::block(const std::uint8_t* bytes) {
    std::uint32_t w[64];
    for (int i = 0; i < 16; ++i) {
        w[i] = static_cast<std::uint32_t>(bytes[4 * i]) << 24 | bytes[4 * i + 1] << 16 |
               bytes[4 * i + 2] << 8 | bytes[4 * i + 3];
    }
    for (int i = 16; i < 64; ++i) {
        const std::uint32_t s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
        const std::uint32_t s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    for (int i = 0; i < 64; ++i) w[i] += kRounds[i];
    std::uint32_t state[8];
    std::copy(state_.begin(), state_.end(), state);
    for (int i = 0; i < 64; i += 8) mix_all(state, w + i, std::make_integer_sequence<int, 8>());
    for (int i = 0; i < 8; ++i) state_[static_cast<std::size_t>(i)] += state[i];
}

std::string sha256(const std::string& bytes) {
    Sha256 hash;
    hash.update(bytes.data(), bytes.size());
    return hash.hex();
}

}  // namespace fluxdeploy
