#include "backends/cuda.hpp"

#include "errors.hpp"

namespace fluxdeploy {
namespace {

// CUdevice_attribute's numbers of cuda.h.
constexpr int kMajor = 75;
constexpr int kMinor = 76;
// CU_STREAM_NON_BLOCKING.
constexpr unsigned kNonBlocking = 1;

}  // namespace

template <class... Parameters>
void Cuda::call(const char* name, Parameters... parameters) const {
    const int status = driver_.function<int (*)(Parameters...)>(name)(parameters...);
    if (status == 0) return;
    const char* words = nullptr;
    driver_.function<int (*)(int, const char**)>("cuGetErrorString")(status, &words);
    throw Error(ErrorCode::engine, std::string("CUDA failed in ") + name + ": " +
                                       (words != nullptr ? words : std::to_string(status)) + ".");
}

Cuda::Cuda(std::int64_t device)
    : driver_("libcuda.so.1", "NVIDIA's driver", "Install it, or use a bundle for the CPU.") {
    try {
        call("cuInit", 0u);
        call("cuDeviceGet", &device_, static_cast<int>(device));
        call("cuDevicePrimaryCtxRetain", &context_, device_);
    } catch (const Error& error) {
        throw Error(ErrorCode::missing_dependency, error.what());
    }
}

std::string Cuda::compute_capability() const {
    int major = 0, minor = 0;
    call("cuDeviceGetAttribute", &major, kMajor, device_);
    call("cuDeviceGetAttribute", &minor, kMinor, device_);
    return "sm" + std::to_string(major) + std::to_string(minor);
}

std::size_t Cuda::free_memory() const {
    std::size_t unused = 0, all = 0;
    call("cuMemGetInfo_v2", &unused, &all);
    return unused;
}

Cuda::Address Cuda::allocate(std::size_t size) const {
    Address address = 0;
    call("cuMemAlloc_v2", &address, size > 0 ? size : 1);
    return address;
}

void Cuda::free(Address address) const noexcept {
    try {
        use_device();
        call("cuMemFree_v2", address);
    } catch (const Error&) {
        // The GPU is lost, and its memory with it.
    }
}

Cuda::Stream Cuda::create_stream() const {
    Stream stream = nullptr;
    call("cuStreamCreate", &stream, kNonBlocking);
    return stream;
}

void Cuda::destroy_stream(Stream stream) const noexcept {
    try {
        use_device();
        call("cuStreamDestroy_v2", stream);
    } catch (const Error&) {
        // As above.
    }
}

void Cuda::copy_in(Address to, const void* from, std::size_t size, Stream stream) const {
    call("cuMemcpyHtoDAsync_v2", to, from, size, stream);
}

void Cuda::copy(Address to, const void* from, std::size_t size, Stream stream) const {
    const auto source = static_cast<Address>(reinterpret_cast<std::uintptr_t>(from));
    call("cuMemcpyAsync", to, source, size, stream);
    synchronize(stream);
}

void Cuda::copy_out(void* to, Address from, std::size_t size, Stream stream) const {
    call("cuMemcpyDtoHAsync_v2", to, from, size, stream);
}

void Cuda::synchronize(Stream stream) const { call("cuStreamSynchronize", stream); }

void Cuda::use_device() const { call("cuCtxSetCurrent", context_); }

}  // namespace fluxdeploy
