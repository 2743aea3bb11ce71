#include "backends/openvino.hpp"

#include <openvino/c/openvino.h>

#include <algorithm>
#include <functional>

#include "backends/shared_library.hpp"
#include "backends/tensors.hpp"
#include "errors.hpp"

// Where it is looked for unless the caller says: CMake's FLUXDEPLOY_OPENVINO_LIBRARY.
#ifndef FLUXDEPLOY_OPENVINO_LIBRARY
#define FLUXDEPLOY_OPENVINO_LIBRARY "libopenvino_c.so"
#endif

namespace fluxdeploy {
namespace {

constexpr const char* kInstall =
    "Install OpenVINO, or name its library: libopenvino_c.so of a release, of a distribution's "
    "package, or in the folder openvino/libs of the Python package.";

// Computed in float32 whatever their graph, as in Python: they run once a picture, and what they
// round away is missing in every step.
constexpr const char* kWide[] = {"clip", "t5", "conditioner"};

// A graph's file names its weights itself.
constexpr const char* kNoWeights = nullptr;

// What is freed by a function of the library.
template <class T>
using Owned = std::unique_ptr<T, std::function<void(T*)>>;

// The library and its core, which all models share. Functions are called by their names.
class Library {
public:
    explicit Library(const std::string& path) : library_(path, "OpenVINO", kInstall) {
        core_ = made<ov_core_t>("OpenVINO does not start", "ov_core_create", "ov_core_free");
    }

    const ov_core_t* core() const { return core_.get(); }

    // Call a function. Raises `Error` (engine) for a status that is no success: "<what>: <why>."
    template <class... Parameters>
    void call(const std::string& what, const char* name, Parameters... parameters) const {
        require(what, library_.function<ov_status_e (*)(Parameters...)>(name)(parameters...));
    }

    // As `call`, of a function that ends in "...".
    template <class Function, class... Parameters>
    void call_open(const std::string& what, const char* name, Parameters... parameters) const {
        require(what, library_.function<Function>(name)(parameters...));
    }

    // What a function puts where its last parameter points.
    template <class T, class... Parameters>
    Owned<T> made(const std::string& what, const char* name, const char* free,
                  Parameters... parameters) const {
        T* pointer = nullptr;
        call(what, name, parameters..., &pointer);
        return own(pointer, free);
    }

    template <class T>
    Owned<T> own(T* pointer, const char* free) const {
        return Owned<T>(pointer, library_.function<void (*)(T*)>(free));
    }

    void free_shape(ov_shape_t* shape) const {
        library_.function<ov_status_e (*)(ov_shape_t*)>("ov_shape_free")(shape);
    }
    void free_shape(ov_partial_shape_t* shape) const {
        library_.function<void (*)(ov_partial_shape_t*)>("ov_partial_shape_free")(shape);
    }

    // Text that the library has made.
    std::string text(char* given) const {
        const std::string copy = given == nullptr ? "" : given;
        library_.function<void (*)(const char*)>("ov_free")(given);
        return copy;
    }

private:
    void require(const std::string& what, ov_status_e status) const {
        if (status == OK) return;
        const char* said = library_.function<const char* (*)()>("ov_get_last_err_msg")();
        std::string why = said == nullptr ? "" : said;
        std::replace_if(why.begin(), why.end(), [](unsigned char c) { return c < ' '; }, ' ');
        while (!why.empty() && (why.back() == ' ' || why.back() == '.')) why.pop_back();
        if (why.empty()) why = "error " + std::to_string(status);
        throw Error(ErrorCode::engine, what + ": " + why + ".");
    }

    SharedLibrary library_;
    Owned<ov_core_t> core_;
};

class OpenVinoEngine : public Engine {
public:
    OpenVinoEngine(std::shared_ptr<const Library> library, const std::string& component,
                   const ComponentRecord& record, const EngineRecord& engine,
                   const std::string& path, const EngineOptions& options)
        : Engine(component, record, engine), library_(std::move(library)) {
        const Library& ov = *library_;
        const std::string what = "OpenVINO cannot open " + component + " (" + path + ")";
        const auto graph = ov.made<ov_model_t>(what, "ov_core_read_model", "ov_model_free",
                                               ov.core(), path.c_str(), kNoWeights);
        model_ = compile(*graph, record.compute, options, what);
        check_boundary(*this, found(true, what), found(false, what));
    }

    std::unique_ptr<Binding> bind(const Inputs& resident) override;

    const Library& library() const { return *library_; }
    const ov_compiled_model_t* model() const { return model_.get(); }

private:
    Owned<ov_compiled_model_t> compile(const ov_model_t& graph, const std::string& compute,
                                       const EngineOptions& options,
                                       const std::string& what) const {
        const Library& ov = *library_;
        char* capabilities = nullptr;
        ov.call(what, "ov_core_get_property", ov.core(), "CPU", "OPTIMIZATION_CAPABILITIES",
                &capabilities);
        const bool has_bf16 = ov.text(capabilities).find("BF16") != std::string::npos;
        const bool wide =
            std::find(std::begin(kWide), std::end(kWide), component) != std::end(kWide);
        const char* precision = compute == "bf16" && has_bf16 && !wide ? "bf16" : "f32";
        const std::string threads = std::to_string(options.threads.value_or(0));
        ov_compiled_model_t* made = nullptr;
        // 8-bit inputs of linears whose weights alone are quantized would be another precision. As
        // many threads as 0 is OpenVINO's own choice.
        ov.call_open<decltype(&ov_core_compile_model)>(
            what, "ov_core_compile_model", ov.core(), &graph, "CPU", std::size_t{8}, &made,
            "INFERENCE_PRECISION_HINT", precision, "PERFORMANCE_HINT", "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE", "0", "INFERENCE_NUM_THREADS", threads.c_str());
        return ov.own(made, "ov_compiled_model_free");
    }

    // A port of the manifest's name, else nothing: it may have several, where a step of the graph
    // changes nothing and is left out.
    Owned<ov_output_const_port_t> port(bool input, const std::string& name) const {
        try {
            return library_->made<ov_output_const_port_t>(
                "", input ? "ov_compiled_model_input_by_name" : "ov_compiled_model_output_by_name",
                "ov_output_const_port_free", model(), name.c_str());
        } catch (const Error&) {
            return {};
        }
    }

    // The graph's inputs, or its outputs: those that the manifest has, or all where one is missing
    // or is too many.
    std::vector<Found> found(bool input, const std::string& what) const {
        const Library& ov = *library_;
        const auto& specs = input ? inputs : outputs;
        std::size_t number = 0;
        ov.call(what, input ? "ov_compiled_model_inputs_size" : "ov_compiled_model_outputs_size",
                model(), &number);
        std::vector<Found> tensors;
        for (const TensorSpec& spec : specs) {
            const auto own = port(input, spec.name);
            if (own) tensors.push_back(described(*own, spec.name, what));
        }
        if (tensors.size() == number) return tensors;
        tensors.clear();
        for (std::size_t i = 0; i < number; ++i) {
            const auto own = ov.made<ov_output_const_port_t>(
                what,
                input ? "ov_compiled_model_input_by_index" : "ov_compiled_model_output_by_index",
                "ov_output_const_port_free", model(), i);
            char* name = nullptr;
            ov.call(what, "ov_port_get_any_name",
                    static_cast<const ov_output_const_port_t*>(own.get()), &name);
            tensors.push_back(described(*own, ov.text(name), what));
        }
        return tensors;
    }

    Found described(const ov_output_const_port_t& own, const std::string& name,
                    const std::string& what) const {
        const Library& ov = *library_;
        ov_element_type_e type = DYNAMIC;
        ov.call(what, "ov_port_get_element_type", &own, &type);
        ov_partial_shape_t shape{};
        ov.call(what, "ov_port_get_partial_shape", &own, &shape);
        Found tensor{name, type == F32 ? "float32" : type == I32 ? "int32" : "another type", {}};
        for (std::int64_t i = 0; shape.dims != nullptr && i < shape.rank.max; ++i) {
            const ov_dimension_t& size = shape.dims[i];
            tensor.shape.push_back(size.min == size.max ? size.min : -1);
        }
        ov.free_shape(&shape);
        return tensor;
    }

    std::shared_ptr<const Library> library_;
    Owned<ov_compiled_model_t> model_;
};

// A request of its own, whose inputs are the caller's memory.
class OpenVinoBinding : public Binding {
public:
    OpenVinoBinding(OpenVinoEngine& engine, const Inputs& resident)
        : engine_(engine),
          what_(engine.component + " failed in OpenVINO"),
          inputs_(engine, resident) {
        request_ = engine.library().made<ov_infer_request_t>(
            what_, "ov_compiled_model_create_infer_request", "ov_infer_request_free",
            engine.model());
        for (const auto& [name, view] : resident) {
            auto& copy = resident_[name];
            const auto* bytes = static_cast<const std::uint8_t*>(view.data());
            copy.assign(bytes, bytes + view.bytes());
            place(name, view, copy.data());
        }
    }

    const Outputs& run(const Inputs& inputs) override {
        const Library& ov = engine_.library();
        inputs_.check(inputs);
        // The interface takes what it only reads as changeable.
        for (const auto& [name, view] : inputs) place(name, view, const_cast<void*>(view.data()));
        ov.call(what_, "ov_infer_request_infer", request_.get());
        for (const TensorSpec& spec : engine_.outputs) fetch(spec.name);
        return outputs_;
    }

private:
    void place(const std::string& name, const View& view, void* data) {
        const Library& ov = engine_.library();
        Shape sizes = view.shape();
        const ov_shape_t shape{static_cast<std::int64_t>(sizes.size()), sizes.data()};
        tensors_[name] =
            ov.made<ov_tensor_t>(what_, "ov_tensor_create_from_host_ptr", "ov_tensor_free",
                                 view.floats() != nullptr ? F32 : I32, shape, data);
        ov.call(what_, "ov_infer_request_set_tensor", request_.get(), name.c_str(),
                static_cast<const ov_tensor_t*>(tensors_[name].get()));
    }

    // Copies what the request has made.
    void fetch(const std::string& name) {
        const Library& ov = engine_.library();
        const auto tensor = ov.made<ov_tensor_t>(
            what_, "ov_infer_request_get_tensor", "ov_tensor_free",
            static_cast<const ov_infer_request_t*>(request_.get()), name.c_str());
        const ov_tensor_t* made = tensor.get();
        ov_shape_t shape{};
        ov.call(what_, "ov_tensor_get_shape", made, &shape);
        Floats& output = outputs_[name];
        output.shape.assign(shape.dims, shape.dims + shape.rank);
        ov.free_shape(&shape);
        void* data = nullptr;
        ov.call(what_, "ov_tensor_data", made, &data);
        const auto* numbers = static_cast<const float*>(data);
        output.values.assign(numbers, numbers + count(output.shape));
    }

    OpenVinoEngine& engine_;
    const std::string what_;
    BoundInputs inputs_;
    std::map<std::string, std::vector<std::uint8_t>> resident_;
    std::map<std::string, Owned<ov_tensor_t>> tensors_;
    Outputs outputs_;
    // Last: what it refers to outlives it.
    Owned<ov_infer_request_t> request_;
};

std::unique_ptr<Binding> OpenVinoEngine::bind(const Inputs& resident) {
    return std::make_unique<OpenVinoBinding>(*this, resident);
}

class OpenVino : public Runtime {
public:
    explicit OpenVino(const EngineOptions& options)
        : options_(options),
          library_(std::make_shared<const Library>(options.libraries.count("openvino") != 0
                                                       ? options.libraries.at("openvino")
                                                       : FLUXDEPLOY_OPENVINO_LIBRARY)) {}

    std::optional<std::string> problem(const std::string&) override { return std::nullopt; }

    std::shared_ptr<Engine> open(const std::string& component, const ComponentRecord& record,
                                 const EngineRecord& engine, const std::string& path) override {
        return std::make_shared<OpenVinoEngine>(library_, component, record, engine, path,
                                                options_);
    }

private:
    EngineOptions options_;
    std::shared_ptr<const Library> library_;
};

}  // namespace

std::unique_ptr<Runtime> load_openvino(const EngineOptions& options) {
    return std::make_unique<OpenVino>(options);
}

}  // namespace fluxdeploy
