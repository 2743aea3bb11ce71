// CUDA through the driver's library alone: memory, streams, copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "backends/shared_library.hpp"

namespace fluxdeploy {

// One GPU. Its functions raise `Error` (engine) with the driver's own words, and may be called from
// any thread.
class Cuda {
public:
    using Address = unsigned long long;
    using Stream = struct CUstream_st*;

    // Raises `Error` (missing_dependency) where there is no driver.
    explicit Cuda(std::int64_t device);

    // Such as "sm89".
    std::string compute_capability() const;
    // Bytes of memory that nobody uses.
    std::size_t free_memory() const;

    Address allocate(std::size_t size) const;
    void free(Address address) const noexcept;
    Stream create_stream() const;
    void destroy_stream(Stream stream) const noexcept;
    void copy_in(Address to, const void* from, std::size_t size, Stream stream) const;
    // Between any two memories, and waits.
    void copy(Address to, const void* from, std::size_t size, Stream stream) const;
    void copy_out(void* to, Address from, std::size_t size, Stream stream) const;
    void synchronize(Stream stream) const;

    // CUDA's current device is a matter of the thread.
    void use_device() const;

private:
    // Call a function of the driver by its name.
    template <class... Parameters>
    void call(const char* name, Parameters... parameters) const;

    SharedLibrary driver_;
    int device_ = 0;
    struct CUctx_st* context_ = nullptr;
};

// Memory of a GPU that is freed with its owner.
class DeviceMemory {
public:
    DeviceMemory() = default;
    DeviceMemory(const Cuda& cuda, std::size_t size)
        : cuda_(&cuda), address_(cuda.allocate(size)) {}
    DeviceMemory(DeviceMemory&& other) noexcept { swap(other); }
    DeviceMemory& operator=(DeviceMemory&& other) noexcept {
        swap(other);
        return *this;
    }
    ~DeviceMemory() {
        if (cuda_ != nullptr) cuda_->free(address_);
    }

    Cuda::Address address() const { return address_; }
    void* pointer() const { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address_)); }

private:
    void swap(DeviceMemory& other) noexcept {
        std::swap(cuda_, other.cuda_);
        std::swap(address_, other.address_);
    }

    const Cuda* cuda_ = nullptr;
    Cuda::Address address_ = 0;
};

}  // namespace fluxdeploy
