// What src/backends/tensorrt.cpp uses of TensorRT 11's header, to compile it where that is not to
// be had: no program can be linked or run with these. A test holds the names against the bindings.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

#define NV_TENSORRT_VERSION 110000

namespace nvinfer1 {

class Dims64 {
public:
    static constexpr std::int32_t MAX_DIMS = 8;
    std::int32_t nbDims;
    std::int64_t d[MAX_DIMS];
};
using Dims = Dims64;

enum class DataType : std::int32_t { kFLOAT = 0, kINT32 = 3 };
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : std::int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };
enum class SeekPosition : std::int32_t { kSET = 0, kCUR = 1, kEND = 2 };
enum class ExecutionContextAllocationStrategy : std::int32_t { kUSER_MANAGED = 2 };

class ILogger {
public:
    enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2 };
    virtual void log(Severity severity, char const* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IStreamReaderV2 {
public:
    virtual ~IStreamReaderV2() = default;
    virtual std::int64_t read(void* to, std::int64_t size, cudaStream_t stream) noexcept = 0;
    virtual bool seek(std::int64_t offset, SeekPosition where) noexcept = 0;
};

class IExecutionContext {
public:
    virtual ~IExecutionContext() noexcept = default;
    std::int32_t getOptimizationProfile() const noexcept;
    bool setOptimizationProfileAsync(std::int32_t index, cudaStream_t stream) noexcept;
    bool setInputShape(char const* name, Dims const& dims) noexcept;
    Dims getTensorShape(char const* name) const noexcept;
    bool setTensorAddress(char const* name, void* data) noexcept;
    std::size_t updateDeviceMemorySizeForShapes() noexcept;
    void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept;
    bool enqueueV3(cudaStream_t stream) noexcept;
};

class ICudaEngine {
public:
    virtual ~ICudaEngine() noexcept = default;
    std::int32_t getNbIOTensors() const noexcept;
    char const* getIOTensorName(std::int32_t index) const noexcept;
    TensorIOMode getTensorIOMode(char const* name) const noexcept;
    DataType getTensorDataType(char const* name) const noexcept;
    Dims getTensorShape(char const* name) const noexcept;
    std::int32_t getNbOptimizationProfiles() const noexcept;
    Dims getProfileShape(char const* name, std::int32_t index,
                         OptProfileSelector select) const noexcept;
    std::int64_t getStreamableWeightsSize() const noexcept;
    std::int64_t getWeightStreamingAutomaticBudget() const noexcept;
    bool setWeightStreamingBudgetV2(std::int64_t budget) noexcept;
    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy how) noexcept;
};

class IRuntime {
public:
    virtual ~IRuntime() noexcept = default;
    ICudaEngine* deserializeCudaEngine(IStreamReaderV2& reader);
};

}  // namespace nvinfer1
