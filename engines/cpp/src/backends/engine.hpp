// The contract: what an engine does for the host, whatever runtime runs it.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "files/manifest.hpp"

namespace fluxdeploy {

// A tensor that somebody else holds: float32 or int32, row-major, in host memory.
class View {
public:
    View(const Floats& array) : shape_(array.shape), floats_(array.data()) {}
    View(const Ints& array) : shape_(array.shape), ints_(array.data()) {}
    View(Shape shape, const float* values) : shape_(std::move(shape)), floats_(values) {}
    View(Shape shape, const std::int32_t* values) : shape_(std::move(shape)), ints_(values) {}

    const Shape& shape() const { return shape_; }
    const char* dtype() const { return floats_ ? "float32" : "int32"; }
    const void* data() const { return floats_ ? static_cast<const void*>(floats_) : ints_; }
    std::size_t bytes() const { return static_cast<std::size_t>(count(shape_)) * 4; }

    // One of them is null.
    const float* floats() const { return floats_; }
    const std::int32_t* ints() const { return ints_; }

private:
    Shape shape_;
    const float* floats_ = nullptr;
    const std::int32_t* ints_ = nullptr;
};

using Inputs = std::map<std::string, View>;
using Outputs = std::map<std::string, Floats>;

// An engine with some inputs already in place, for a loop that calls it many times. It belongs to
// one thread at a time, and is destroyed before its engine.
class Binding {
public:
    virtual ~Binding() = default;

    // Run once with the inputs that change. The outputs belong to the binding: the next call
    // overwrites them. Raises `Error` (engine) for a missing, unknown or misshapen tensor.
    virtual const Outputs& run(const Inputs& inputs) = 0;
};

// An opened component. Several threads may use it at the same time.
class Engine {
public:
    Engine(std::string component, const ComponentRecord& record, const EngineRecord& engine)
        : component(std::move(component)),
          inputs(record.inputs),
          outputs(record.outputs),
          dimensions(engine.dimensions) {}
    virtual ~Engine() = default;
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    // Place the inputs that stay the same between calls on the engine's device, once. They are
    // copied. Raises `Error` (engine) for an unknown or misshapen tensor.
    virtual std::unique_ptr<Binding> bind(const Inputs& resident) = 0;

    // Run once. Raises `Error` (engine) for a missing, unknown or misshapen tensor.
    Outputs run(const Inputs& inputs) { return bind({})->run(inputs); }

    const std::string component;
    const std::vector<TensorSpec> inputs;
    const std::vector<TensorSpec> outputs;
    // The sizes accepted for each symbol; a symbol that is not in it has no limit.
    const std::map<std::string, DimensionRange> dimensions;
};

// How to run engines on this machine; nothing here changes their numbers.
struct EngineOptions {
    std::optional<std::int64_t> threads;
    std::int64_t device = 0;
    // By the runtime's name, the path of its shared library; else its usual name.
    std::map<std::string, std::string> libraries;
};

// A runtime that was loaded. It outlives its engines.
class Runtime {
public:
    virtual ~Runtime() = default;

    // Why engines for `target` cannot run here, or nothing where they can.
    virtual std::optional<std::string> problem(const std::string& target) = 0;

    // Open one engine of a bundle, the file `path`. Raises `Error` (engine) where it is broken or
    // does not fit this machine.
    virtual std::shared_ptr<Engine> open(const std::string& component,
                                         const ComponentRecord& record, const EngineRecord& engine,
                                         const std::string& path) = 0;
};

}  // namespace fluxdeploy
