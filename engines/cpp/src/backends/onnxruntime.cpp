#include "backends/onnxruntime.hpp"

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <functional>

#include "backends/shared_library.hpp"
#include "backends/tensors.hpp"
#include "errors.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// Where it is looked for unless the caller says: CMake's FLUXDEPLOY_ONNXRUNTIME.
#ifndef FLUXDEPLOY_ONNXRUNTIME
#define FLUXDEPLOY_ONNXRUNTIME "libonnxruntime.so.1"
#endif

namespace fluxdeploy {
namespace {

constexpr const char* kInstall =
    "Install ONNX Runtime 1.21 or later, or name its library: that of a release, of a "
    "distribution's package, or in the folder onnxruntime/capi of the Python package.";

// What is freed by a function of the library's table.
template <class T>
using Owned = std::unique_ptr<T, std::function<void(T*)>>;

void ORT_API_CALL say_nothing(void*, OrtLoggingLevel, const char*, const char*, const char*,
                              const char*) {}

// The library and its environment, which all sessions share.
class Library {
public:
    explicit Library(const std::string& path) : library_(path, "ONNX Runtime", kInstall) {
        const auto base = library_.function<const OrtApiBase*(ORT_API_CALL*)()>("OrtGetApiBase")();
        api_ = base->GetApi(ORT_API_VERSION);
        if (api_ == nullptr) {
            throw Error(ErrorCode::missing_dependency, std::string("ONNX Runtime ") +
                                                           base->GetVersionString() +
                                                           " is too old. " + kInstall);
        }
        OrtEnv* env = nullptr;
        require(api_->CreateEnvWithCustomLogger(say_nothing, nullptr, ORT_LOGGING_LEVEL_FATAL,
                                                "fluxdeploy", &env),
                "ONNX Runtime does not start");
        env_ = own(env, api_->ReleaseEnv);
        require(api_->DisableTelemetryEvents(env), "ONNX Runtime does not start");
    }

    const OrtApi* operator->() const { return api_; }
    const OrtEnv* env() const { return env_.get(); }

    // Raise `Error` (engine) for a status that is no success: "<what>: <why>."
    void require(OrtStatus* status, const std::string& what) const {
        if (status == nullptr) return;
        std::string why = api_->GetErrorMessage(status);
        api_->ReleaseStatus(status);
        std::replace_if(why.begin(), why.end(), [](unsigned char c) { return c < ' '; }, ' ');
        while (!why.empty() && (why.back() == ' ' || why.back() == '.')) why.pop_back();
        throw Error(ErrorCode::engine, what + ": " + why + ".");
    }

    template <class T>
    static Owned<T> own(T* made, void(ORT_API_CALL* release)(T*)) {
        return Owned<T>(made, release);
    }

private:
    SharedLibrary library_;
    const OrtApi* api_ = nullptr;
    Owned<OrtEnv> env_;
};

// Whether products of bytes can overflow: a processor with AVX2 and without VNNI.
bool overflows() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool avx_vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
    return __builtin_cpu_supports("avx2") && !avx_vnni && !__builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

class OnnxRuntimeEngine;

class OnnxRuntimeBinding : public Binding {
public:
    OnnxRuntimeBinding(OnnxRuntimeEngine& engine, const Inputs& resident);
    const Outputs& run(const Inputs& inputs) override;

private:
    void bind_input(const std::string& name, const View& view);
    void bind_outputs(const Sizes& sizes);
    void fetch_outputs();

    OnnxRuntimeEngine& engine_;
    BoundInputs inputs_;
    std::map<std::string, std::vector<std::uint8_t>> resident_;
    std::map<std::string, Owned<OrtValue>> values_;
    std::map<std::string, Owned<OrtValue>> output_values_;
    Outputs outputs_;
    // Whether all outputs are bound to `outputs_`; else the runtime makes them.
    bool in_place_ = true;
    Sizes sizes_;
    // Last: what it refers to outlives it.
    Owned<OrtIoBinding> binding_;
};

class OnnxRuntimeEngine : public Engine {
public:
    OnnxRuntimeEngine(std::shared_ptr<const Library> library, const std::string& component,
                      const ComponentRecord& record, const EngineRecord& engine,
                      const std::string& path, const EngineOptions& options)
        : Engine(component, record, engine), library_(std::move(library)) {
        const Library& ort = *library_;
        const std::string what = "ONNX Runtime cannot open " + component + " (" + path + ")";
        OrtSessionOptions* made = nullptr;
        ort.require(ort->CreateSessionOptions(&made), what);
        const auto settings = Library::own(made, ort->ReleaseSessionOptions);
        configure(*settings, record.precision, engine.target, options, what);
        OrtSession* session = nullptr;
        ort.require(ort->CreateSession(ort.env(), path.c_str(), settings.get(), &session), what);
        session_ = Library::own(session, ort->ReleaseSession);
        OrtMemoryInfo* memory = nullptr;
        ort.require(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory), what);
        memory_ = Library::own(memory, ort->ReleaseMemoryInfo);
        check_boundary(*this, found(true, what), found(false, what));
    }

    std::unique_ptr<Binding> bind(const Inputs& resident) override {
        return std::make_unique<OnnxRuntimeBinding>(*this, resident);
    }

    const Library& library() const { return *library_; }
    OrtSession* session() const { return session_.get(); }
    const OrtMemoryInfo* memory() const { return memory_.get(); }

private:
    void configure(OrtSessionOptions& settings, const std::string& precision,
                   const std::string& target, const EngineOptions& options,
                   const std::string& what) const {
        const Library& ort = *library_;
        const auto set = [&](const char* key, const char* value) {
            ort.require(ort->AddSessionConfigEntry(&settings, key, value), what);
        };
        ort.require(ort->SetSessionLogSeverityLevel(&settings, ORT_LOGGING_LEVEL_FATAL), what);
        // A session's threads would go on looking for work after a run, on the cores that the next
        // component's threads need.
        set("session.force_spinning_stop", "1");
        // They do so from the session's beginning until its first run ends: while it is made, and
        // while others are. In microseconds, longer than from one operator to the next.
        set("session.intra_op.spin_duration_us", "100");
        // Its rewriting of quantized products is for integers: FP8 runs as its emulation.
        if (precision.rfind("fp8", 0) == 0) set("session.disable_quant_qdq", "1");
        // Products in float32: the default rounds their inputs to 8 bits.
        if (precision == "int4-weights") set("session.qdq_matmulnbits_accuracy_level", "1");
        if (precision == "int8-dynamic" && overflows()) set("session.x64quantprecision", "1");
        if (options.threads) {
            ort.require(ort->SetIntraOpNumThreads(&settings, static_cast<int>(*options.threads)),
                        what);
        }
        if (target == "cuda") {
            OrtCUDAProviderOptionsV2* made = nullptr;
            ort.require(ort->CreateCUDAProviderOptions(&made), what);
            const auto cuda = Library::own(made, ort->ReleaseCUDAProviderOptions);
            const std::string device = std::to_string(options.device);
            // The default tries every algorithm for each new size of picture, for seconds.
            const char* const keys[] = {"device_id", "cudnn_conv_algo_search"};
            const char* const values[] = {device.c_str(), "HEURISTIC"};
            ort.require(ort->UpdateCUDAProviderOptions(cuda.get(), keys, values, 2), what);
            ort.require(ort->SessionOptionsAppendExecutionProvider_CUDA_V2(&settings, cuda.get()),
                        what);
        }
    }

    // The graph's inputs, or its outputs.
    std::vector<Found> found(bool inputs, const std::string& what) const {
        const Library& ort = *library_;
        OrtAllocator* allocator = nullptr;
        ort.require(ort->GetAllocatorWithDefaultOptions(&allocator), what);
        std::size_t number = 0;
        ort.require(inputs ? ort->SessionGetInputCount(session(), &number)
                           : ort->SessionGetOutputCount(session(), &number),
                    what);
        std::vector<Found> tensors(number);
        for (std::size_t i = 0; i < number; ++i) {
            char* name = nullptr;
            ort.require(inputs ? ort->SessionGetInputName(session(), i, allocator, &name)
                               : ort->SessionGetOutputName(session(), i, allocator, &name),
                        what);
            tensors[i].name = name;
            ort.require(ort->AllocatorFree(allocator, name), what);
            OrtTypeInfo* type = nullptr;
            ort.require(inputs ? ort->SessionGetInputTypeInfo(session(), i, &type)
                               : ort->SessionGetOutputTypeInfo(session(), i, &type),
                        what);
            const auto owned = Library::own(type, ort->ReleaseTypeInfo);
            const OrtTensorTypeAndShapeInfo* info = nullptr;
            ort.require(ort->CastTypeInfoToTensorInfo(type, &info), what);
            if (info == nullptr) {
                tensors[i].dtype = "no tensor";
                continue;
            }
            ONNXTensorElementDataType dtype = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
            ort.require(ort->GetTensorElementType(info, &dtype), what);
            tensors[i].dtype = dtype == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT   ? "float32"
                               : dtype == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 ? "int32"
                                                                              : "another type";
            std::size_t rank = 0;
            ort.require(ort->GetDimensionsCount(info, &rank), what);
            tensors[i].shape.resize(rank);
            ort.require(ort->GetDimensions(info, tensors[i].shape.data(), rank), what);
        }
        return tensors;
    }

    std::shared_ptr<const Library> library_;
    Owned<OrtSession> session_;
    Owned<OrtMemoryInfo> memory_;
};

OnnxRuntimeBinding::OnnxRuntimeBinding(OnnxRuntimeEngine& engine, const Inputs& resident)
    : engine_(engine), inputs_(engine, resident) {
    const Library& ort = engine.library();
    OrtIoBinding* made = nullptr;
    ort.require(ort->CreateIoBinding(engine.session(), &made),
                engine.component + " failed in ONNX Runtime");
    binding_ = Library::own(made, ort->ReleaseIoBinding);
    for (const auto& [name, view] : resident) {
        // On the CPU a bound value is the caller's own memory: a copy, so that the caller may use
        // it again there as on a GPU.
        auto& copy = resident_[name];
        const auto* bytes = static_cast<const std::uint8_t*>(view.data());
        copy.assign(bytes, bytes + view.bytes());
        bind_input(name,
                   view.floats() != nullptr
                       ? View(view.shape(), reinterpret_cast<const float*>(copy.data()))
                       : View(view.shape(), reinterpret_cast<const std::int32_t*>(copy.data())));
    }
}

void OnnxRuntimeBinding::bind_input(const std::string& name, const View& view) {
    const Library& ort = engine_.library();
    const std::string what = engine_.component + " failed in ONNX Runtime";
    OrtValue* value = nullptr;
    // The interface takes what it only reads as changeable.
    ort.require(ort->CreateTensorWithDataAsOrtValue(
                    engine_.memory(), const_cast<void*>(view.data()), view.bytes(),
                    view.shape().data(), view.shape().size(),
                    view.floats() != nullptr ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                                             : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
                    &value),
                what);
    values_[name] = Library::own(value, ort->ReleaseValue);
    ort.require(ort->BindInput(binding_.get(), name.c_str(), value), what);
}

void OnnxRuntimeBinding::bind_outputs(const Sizes& sizes) {
    const Library& ort = engine_.library();
    const std::string what = engine_.component + " failed in ONNX Runtime";
    ort->ClearBoundOutputs(binding_.get());
    sizes_ = sizes;
    in_place_ =
        std::all_of(engine_.outputs.begin(), engine_.outputs.end(),
                    [&](const TensorSpec& spec) { return output_shape(spec, sizes).has_value(); });
    for (const TensorSpec& spec : engine_.outputs) {
        if (!in_place_) {
            ort.require(
                ort->BindOutputToDevice(binding_.get(), spec.name.c_str(), engine_.memory()), what);
            continue;
        }
        Floats& array = outputs_[spec.name] = Floats(*output_shape(spec, sizes));
        OrtValue* value = nullptr;
        ort.require(ort->CreateTensorWithDataAsOrtValue(
                        engine_.memory(), array.data(), array.values.size() * sizeof(float),
                        array.shape.data(), array.shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                        &value),
                    what);
        output_values_[spec.name] = Library::own(value, ort->ReleaseValue);
        ort.require(ort->BindOutput(binding_.get(), spec.name.c_str(), value), what);
    }
}

// Copies what the runtime has made.
void OnnxRuntimeBinding::fetch_outputs() {
    const Library& ort = engine_.library();
    const std::string what = engine_.component + " failed in ONNX Runtime";
    OrtAllocator* allocator = nullptr;
    ort.require(ort->GetAllocatorWithDefaultOptions(&allocator), what);
    OrtValue** values = nullptr;
    std::size_t number = 0;
    ort.require(ort->GetBoundOutputValues(binding_.get(), allocator, &values, &number), what);
    const Owned<OrtValue*> list(values, [&](OrtValue** all) {
        for (std::size_t i = 0; i < number; ++i) ort->ReleaseValue(all[i]);
        allocator->Free(allocator, all);
    });
    for (std::size_t i = 0; i < number; ++i) {
        OrtTensorTypeAndShapeInfo* made = nullptr;
        ort.require(ort->GetTensorTypeAndShape(values[i], &made), what);
        const auto info = Library::own(made, ort->ReleaseTensorTypeAndShapeInfo);
        std::size_t rank = 0;
        ort.require(ort->GetDimensionsCount(made, &rank), what);
        Shape shape(rank);
        ort.require(ort->GetDimensions(made, shape.data(), rank), what);
        void* data = nullptr;
        ort.require(ort->GetTensorMutableData(values[i], &data), what);
        const auto* numbers = static_cast<const float*>(data);
        const std::int64_t size = count(shape);
        outputs_[engine_.outputs[i].name] = Floats(std::move(shape), {numbers, numbers + size});
    }
}

const Outputs& OnnxRuntimeBinding::run(const Inputs& inputs) {
    const Library& ort = engine_.library();
    const Sizes sizes = inputs_.check(inputs);
    if (sizes != sizes_) bind_outputs(sizes);
    for (const auto& [name, view] : inputs) bind_input(name, view);
    ort.require(ort->RunWithBinding(engine_.session(), nullptr, binding_.get()),
                engine_.component + " failed in ONNX Runtime");
    if (!in_place_) fetch_outputs();
    return outputs_;
}

class OnnxRuntime : public Runtime {
public:
    explicit OnnxRuntime(const EngineOptions& options)
        : options_(options),
          library_(std::make_shared<const Library>(options.libraries.count("onnxruntime") != 0
                                                       ? options.libraries.at("onnxruntime")
                                                       : FLUXDEPLOY_ONNXRUNTIME)) {}

    std::optional<std::string> problem(const std::string& target) override {
        if (target == "cpu") return std::nullopt;
        const Library& ort = *library_;
        char** names = nullptr;
        int number = 0;
        ort.require(ort->GetAvailableProviders(&names, &number), "ONNX Runtime fails");
        const bool there = std::any_of(names, names + number, [](const char* name) {
            return std::string(name) == "CUDAExecutionProvider";
        });
        ort.require(ort->ReleaseAvailableProviders(names, number), "ONNX Runtime fails");
        if (!there) return "this onnxruntime has no CUDA provider";
        return has_nvidia_driver()
                   ? std::nullopt
                   : std::optional<std::string>("the CUDA provider is there, but no NVIDIA driver");
    }

    std::shared_ptr<Engine> open(const std::string& component, const ComponentRecord& record,
                                 const EngineRecord& engine, const std::string& path) override {
        return std::make_shared<OnnxRuntimeEngine>(library_, component, record, engine, path,
                                                   options_);
    }

private:
    static bool has_nvidia_driver() {
        try {
            const SharedLibrary driver("libcuda.so.1", "NVIDIA's driver", "Install it.");
            return driver.function<int (*)(unsigned)>("cuInit")(0) == 0;
        } catch (const Error&) {
            return false;
        }
    }

    EngineOptions options_;
    std::shared_ptr<const Library> library_;
};

}  // namespace

std::unique_ptr<Runtime> load_onnxruntime(const EngineOptions& options) {
    return std::make_unique<OnnxRuntime>(options);
}

}  // namespace fluxdeploy
