#include "backends/tensorrt.hpp"

#include <NvInfer.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <mutex>

#include "arguments.hpp"
#include "backends/cuda.hpp"
#include "backends/shared_library.hpp"
#include "backends/tensors.hpp"
#include "errors.hpp"

namespace fluxdeploy {
namespace {

#ifdef FLUXDEPLOY_RTX
constexpr const char* kName = "tensorrt-rtx";
constexpr const char* kLibrary = "libtensorrt_rtx.so.1";
#else
constexpr const char* kName = "tensorrt";
constexpr const char* kLibrary = "libnvinfer.so.11";
#endif

// Bytes to leave free on the GPU for activations before weights are streamed instead.
constexpr std::size_t kReserve = std::size_t{1} << 30;

// Keeps the latest errors, for what is told of a failure.
class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kERROR) return;
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            latest_ = message;
        } catch (...) {
            // Memory is at its end: then there are no words.
        }
    }

    // The latest error, which is forgotten.
    std::string take(const std::string& otherwise) {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::string words = latest_.empty() ? otherwise : latest_;
        latest_.clear();
        while (!words.empty() && words.back() == '.') words.pop_back();
        return words;
    }

private:
    std::mutex mutex_;
    std::string latest_;
};

// Gives an engine's file in pieces: no second copy of it is in the host's memory.
class Reader : public nvinfer1::IStreamReaderV2 {
public:
    Reader(const Cuda& cuda, const std::string& path)
        : cuda_(cuda), file_(path, std::ios::binary) {}

    int64_t read(void* to, int64_t size, cudaStream_t stream) noexcept override {
        try {
            // The place may be the GPU's: a copy from the host's memory takes either kind.
            buffer_.resize(static_cast<std::size_t>(size));
            file_.read(buffer_.data(), size);
            const std::streamsize got = file_.gcount();
            if (got > 0) {
                const auto address = static_cast<Cuda::Address>(reinterpret_cast<uintptr_t>(to));
                auto* own = reinterpret_cast<Cuda::Stream>(stream);
                cuda_.copy(address, buffer_.data(), static_cast<std::size_t>(got), own);
            }
            file_.clear();
            return got;
        } catch (...) {
            return -1;  // no exception may pass through the library
        }
    }

    bool seek(int64_t offset, nvinfer1::SeekPosition where) noexcept override {
        const auto from = where == nvinfer1::SeekPosition::kSET   ? std::ios::beg
                          : where == nvinfer1::SeekPosition::kCUR ? std::ios::cur
                                                                  : std::ios::end;
        try {
            file_.clear();
            file_.seekg(offset, from);
            return file_.good();
        } catch (...) {
            return false;
        }
    }

private:
    const Cuda& cuda_;
    std::ifstream file_;
    std::vector<char> buffer_;
};

Shape shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }

nvinfer1::Dims dims_of(const Shape& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

// The library with its runtime, and the GPU.
struct Device {
    explicit Device(const EngineOptions& options)
        : library(options.libraries.count(kName) != 0 ? options.libraries.at(kName) : kLibrary,
                  kName, "Install it, in the version that built the engine."),
          cuda(options.device) {
        cuda.use_device();
        const auto create =
            library.function<void* (*)(void*, std::int32_t)>("createInferRuntime_INTERNAL");
        runtime.reset(static_cast<nvinfer1::IRuntime*>(create(&logger, NV_TENSORRT_VERSION)));
        if (!runtime) {
            throw Error(ErrorCode::missing_dependency,
                        std::string(kName) + " does not start: " +
                            logger.take("look at the NVIDIA driver, `nvidia-smi`") + ".");
        }
    }

    SharedLibrary library;
    Logger logger;
    Cuda cuda;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
};

class TensorRtEngine : public Engine {
public:
    TensorRtEngine(std::shared_ptr<Device> device, const std::string& component,
                   const ComponentRecord& record, const EngineRecord& engine,
                   const std::string& path)
        : Engine(component, record, engine), device_(std::move(device)) {
        device_->cuda.use_device();
        Reader reader(device_->cuda, path);
        engine_.reset(device_->runtime->deserializeCudaEngine(reader));
        if (!engine_) {
            throw Error(ErrorCode::engine,
                        std::string(kName) + " cannot open " + component + " (" + path + "): " +
                            device_->logger.take("the file is not an engine of this version") +
                            ".");
        }
        // Weights stay on the host where the GPU cannot hold them all, if the engine may do so.
        const std::int64_t streamable = engine_->getStreamableWeightsSize();
        if (streamable > 0 &&
            device_->cuda.free_memory() < static_cast<std::size_t>(streamable) + kReserve) {
            engine_->setWeightStreamingBudgetV2(engine_->getWeightStreamingAutomaticBudget());
        }
        check_boundary(*this, found(nvinfer1::TensorIOMode::kINPUT),
                       found(nvinfer1::TensorIOMode::kOUTPUT));
    }

    std::unique_ptr<Binding> bind(const Inputs& resident) override;

    Device& device() const { return *device_; }

    // A context is a binding's own: bindings run side by side.
    std::unique_ptr<nvinfer1::IExecutionContext> create_context() {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::unique_ptr<nvinfer1::IExecutionContext> context(engine_->createExecutionContext(
            nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
        if (!context) fail("cannot make an execution context");
        return context;
    }

    // The narrowest profile that takes these shapes: it is tuned closest to them.
    std::int32_t choose_profile(const std::map<std::string, Shape>& shapes) const {
        std::int32_t best = -1;
        double narrowest = std::numeric_limits<double>::infinity();
        for (std::int32_t index = 0; index < engine_->getNbOptimizationProfiles(); ++index) {
            double span = 0;
            bool fits = true;
            for (const auto& [name, shape] : shapes) {
                const auto limit = [&](nvinfer1::OptProfileSelector which) {
                    return shape_of(engine_->getProfileShape(name.c_str(), index, which));
                };
                const Shape least = limit(nvinfer1::OptProfileSelector::kMIN);
                const Shape most = limit(nvinfer1::OptProfileSelector::kMAX);
                fits = fits && least.size() == shape.size() && most.size() == shape.size();
                for (std::size_t axis = 0; fits && axis < shape.size(); ++axis) {
                    fits = least[axis] <= shape[axis] && shape[axis] <= most[axis];
                    span += std::log(static_cast<double>(std::max<std::int64_t>(most[axis], 1)) /
                                     static_cast<double>(std::max<std::int64_t>(least[axis], 1)));
                }
            }
            if (fits && span < narrowest) {
                narrowest = span;
                best = index;
            }
        }
        if (best < 0) {
            std::string asked;
            for (const auto& [name, shape] : shapes) {
                asked += (asked.empty() ? "" : ", ") + name + " " + shown(shape);
            }
            throw Error(ErrorCode::engine,
                        component + ": no resolution bucket of this engine takes " + asked + ".");
        }
        return best;
    }

    [[noreturn]] void fail(const std::string& what) const {
        throw Error(ErrorCode::engine, component + ": TensorRT " + what + ": " +
                                           device_->logger.take("it gives no reason") + ".");
    }

    void require(bool done, const std::string& what) const {
        if (!done) fail("refuses " + what);
    }

private:
    std::vector<Found> found(nvinfer1::TensorIOMode mode) const {
        std::vector<Found> tensors;
        for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char* name = engine_->getIOTensorName(i);
            if (engine_->getTensorIOMode(name) != mode) continue;
            const nvinfer1::DataType type = engine_->getTensorDataType(name);
            tensors.push_back({name,
                               type == nvinfer1::DataType::kFLOAT   ? "float32"
                               : type == nvinfer1::DataType::kINT32 ? "int32"
                                                                    : "another type",
                               shape_of(engine_->getTensorShape(name))});
        }
        return tensors;
    }

    // In this order: the engine goes before the runtime.
    std::shared_ptr<Device> device_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::mutex mutex_;
};

// Resident inputs lie on the GPU; buffers for the others stay while sizes do.
class TensorRtBinding : public Binding {
public:
    TensorRtBinding(TensorRtEngine& engine, const Inputs& resident)
        : engine_(engine), inputs_(engine, resident) {
        const Cuda& cuda = engine.device().cuda;
        cuda.use_device();
        stream_ = std::unique_ptr<CUstream_st, Destroy>(cuda.create_stream(), Destroy{&cuda});
        context_ = engine.create_context();
        for (const auto& [name, view] : resident) put(name, view);
        cuda.synchronize(stream_.get());  // the caller's memory may go
    }

    const Outputs& run(const Inputs& inputs) override {
        const Cuda& cuda = engine_.device().cuda;
        const Sizes sizes = inputs_.check(inputs);
        cuda.use_device();
        const bool same = sizes == sizes_;
        if (!same) {
            for (const auto& [name, view] : inputs) buffers_.erase(name);
        }
        for (const auto& [name, view] : inputs) put(name, view);
        if (!same) prepare();
        if (!context_->enqueueV3(reinterpret_cast<cudaStream_t>(stream_.get()))) {
            engine_.fail("failed while it ran");
        }
        for (auto& [name, values] : outputs_) {
            cuda.copy_out(values.data(), buffers_.at(name).address(),
                          values.values.size() * sizeof(float), stream_.get());
        }
        cuda.synchronize(stream_.get());
        sizes_ = sizes;
        return outputs_;
    }

private:
    struct Destroy {
        const Cuda* cuda;
        void operator()(Cuda::Stream stream) const noexcept { cuda->destroy_stream(stream); }
    };

    void put(const std::string& name, const View& view) {
        const Cuda& cuda = engine_.device().cuda;
        auto buffer = buffers_.find(name);
        if (buffer == buffers_.end()) {
            buffer = buffers_.emplace(name, DeviceMemory(cuda, view.bytes())).first;
            shapes_[name] = view.shape();
        }
        cuda.copy_in(buffer->second.address(), view.data(), view.bytes(), stream_.get());
    }

    // Profile, shapes, outputs and scratch memory for the sizes of the inputs that are in place.
    void prepare() {
        const Cuda& cuda = engine_.device().cuda;
        sizes_.clear();  // until all of it is done
        const std::int32_t profile = engine_.choose_profile(shapes_);
        if (context_->getOptimizationProfile() != profile) {
            engine_.require(context_->setOptimizationProfileAsync(
                                profile, reinterpret_cast<cudaStream_t>(stream_.get())),
                            "profile " + std::to_string(profile));
        }
        for (const auto& [name, shape] : shapes_) {
            engine_.require(context_->setInputShape(name.c_str(), dims_of(shape)),
                            "shape " + shown(shape) + " of " + name);
        }
        for (const TensorSpec& spec : engine_.outputs) {
            Floats values(shape_of(context_->getTensorShape(spec.name.c_str())));
            buffers_.erase(spec.name);
            buffers_.emplace(spec.name, DeviceMemory(cuda, values.values.size() * sizeof(float)));
            outputs_[spec.name] = std::move(values);
        }
        for (const auto& [name, buffer] : buffers_) {
            engine_.require(context_->setTensorAddress(name.c_str(), buffer.pointer()),
                            "the address of " + name);
        }
        const std::size_t scratch = context_->updateDeviceMemorySizeForShapes();
        scratch_ = DeviceMemory();  // first, so that old and new need not fit side by side
        scratch_ = DeviceMemory(cuda, scratch);
        context_->setDeviceMemoryV2(scratch_.pointer(), static_cast<std::int64_t>(scratch));
    }

    TensorRtEngine& engine_;
    BoundInputs inputs_;
    std::map<std::string, Shape> shapes_;
    std::map<std::string, DeviceMemory> buffers_;
    DeviceMemory scratch_;
    Outputs outputs_;
    Sizes sizes_;
    // Last: the context goes before the memory that it works in.
    std::unique_ptr<CUstream_st, Destroy> stream_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

std::unique_ptr<Binding> TensorRtEngine::bind(const Inputs& resident) {
    return std::make_unique<TensorRtBinding>(*this, resident);
}

class TensorRt : public Runtime {
public:
    explicit TensorRt(const EngineOptions& options)
        : device_(std::make_shared<Device>(options)),
          capability_(device_->cuda.compute_capability()) {}

    std::optional<std::string> problem(const std::string& target) override {
        if (target == capability_) return std::nullopt;
        return "this GPU is " + capability_;
    }

    std::shared_ptr<Engine> open(const std::string& component, const ComponentRecord& record,
                                 const EngineRecord& engine, const std::string& path) override {
        return std::make_shared<TensorRtEngine>(device_, component, record, engine, path);
    }

private:
    std::shared_ptr<Device> device_;
    std::string capability_;
};

}  // namespace

#ifdef FLUXDEPLOY_RTX
std::unique_ptr<Runtime> load_tensorrt_rtx(const EngineOptions& options) {
    return std::make_unique<TensorRt>(options);
}
#else
std::unique_ptr<Runtime> load_tensorrt(const EngineOptions& options) {
    return std::make_unique<TensorRt>(options);
}
#endif

}  // namespace fluxdeploy
