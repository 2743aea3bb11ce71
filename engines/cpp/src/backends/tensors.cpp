#include "backends/tensors.hpp"

#include <algorithm>

#include "arguments.hpp"
#include "errors.hpp"

namespace fluxdeploy {
namespace {

constexpr const char* kRebuild = " Build the bundle again with `fluxdeploy build`.";

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::engine, message); }

// A shape with symbols, as Python writes a list: ['B', 16, 'h', 'w'].
std::string in_words(const std::vector<Dimension>& shape, const Sizes& known = {}) {
    std::string text = "[";
    for (const Dimension& each : shape) {
        if (text.size() > 1) text += ", ";
        if (const auto* symbol = std::get_if<std::string>(&each)) {
            const auto size = known.find(*symbol);
            text += size == known.end() ? "'" + *symbol + "'" : std::to_string(size->second);
        } else {
            text += std::to_string(std::get<std::int64_t>(each));
        }
    }
    return text + "]";
}

template <class Specs, class Name>
std::string names(const Specs& specs, Name name) {
    std::string text;
    for (const auto& spec : specs) text += (text.empty() ? "" : ", ") + name(spec);
    return text;
}

bool fits(const TensorSpec& spec, const Shape& shape, const Engine& engine) {
    if (shape.size() != spec.shape.size()) return false;
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
        if (shape[axis] < 0) continue;
        if (const auto* fixed = std::get_if<std::int64_t>(&spec.shape[axis])) {
            if (*fixed != shape[axis]) return false;
            continue;
        }
        const auto allowed = engine.dimensions.find(std::get<std::string>(spec.shape[axis]));
        if (allowed == engine.dimensions.end() || allowed->second.min != shape[axis] ||
            allowed->second.max != shape[axis]) {
            return false;
        }
    }
    return true;
}

std::string free_or_sizes(const Shape& shape) {
    std::string text = "[";
    for (const std::int64_t size : shape) {
        if (text.size() > 1) text += ", ";
        text += size < 0 ? "'free'" : std::to_string(size);
    }
    return text + "]";
}

void check_side(const Engine& engine, const std::string& side, const std::vector<TensorSpec>& specs,
                const std::vector<Found>& found) {
    const auto find = [&](const std::string& name) {
        return std::find_if(found.begin(), found.end(),
                            [&](const Found& each) { return each.name == name; });
    };
    bool equal = std::all_of(specs.begin(), specs.end(), [&](const TensorSpec& spec) {
        return find(spec.name) != found.end();
    });
    // What else a graph gives is left alone; what else it takes would be missing in each run.
    if (side == "inputs") equal = equal && found.size() == specs.size();
    if (!equal) {
        const std::string has = names(found, [](const Found& each) { return each.name; });
        refuse("The manifest says that " + engine.component + " has the " + side + " " +
               names(specs, [](const TensorSpec& spec) { return spec.name; }) +
               ", and its graph has " + (has.empty() ? "none" : has) + "." + kRebuild);
    }
    for (const TensorSpec& spec : specs) {
        const auto each = find(spec.name);
        if (each->dtype != spec.dtype || !fits(spec, each->shape, engine)) {
            refuse("The manifest says that " + spec.name + " of " + engine.component + " is " +
                   spec.dtype + " " + in_words(spec.shape) + ", and its graph has " + each->dtype +
                   " " + free_or_sizes(each->shape) + "." + kRebuild);
        }
    }
}

void check_inputs(const Engine& engine, const std::vector<const TensorSpec*>& specs,
                  const Inputs& inputs, Sizes& sizes) {
    const auto known = [&](const std::string& name) {
        return std::any_of(specs.begin(), specs.end(),
                           [&](const TensorSpec* spec) { return spec->name == name; });
    };
    const auto wrong = [&](const std::string& name, const char* what) {
        refuse(engine.component + ": tensor " + name + " " + what + "; the inputs here are " +
               names(specs, [](const TensorSpec* spec) { return spec->name; }) + ".");
    };
    for (const auto& [name, view] : inputs) {
        if (!known(name)) wrong(name, "is not one of its inputs");
    }
    for (const TensorSpec* spec : specs) {
        const auto input = inputs.find(spec->name);
        if (input == inputs.end()) wrong(spec->name, "is missing");
        const View& view = input->second;
        if (spec->dtype != view.dtype()) {
            refuse(engine.component + ": " + spec->name + " is " + view.dtype() + "; " +
                   spec->dtype + " is needed.");
        }
        bool right = view.shape().size() == spec->shape.size();
        for (std::size_t axis = 0; right && axis < spec->shape.size(); ++axis) {
            const Dimension& wanted = spec->shape[axis];
            const std::int64_t size = view.shape()[axis];
            if (const auto* symbol = std::get_if<std::string>(&wanted)) {
                right = sizes.emplace(*symbol, size).first->second == size;
            } else {
                right = std::get<std::int64_t>(wanted) == size;
            }
        }
        if (!right) {
            refuse(engine.component + ": " + spec->name + " has shape " +
                   fluxdeploy::shown(view.shape()) + "; " + in_words(spec->shape, sizes) +
                   " is needed (that is " + in_words(spec->shape) + ").");
        }
    }
    for (const auto& [symbol, allowed] : engine.dimensions) {
        const auto size = sizes.find(symbol);
        if (size != sizes.end() && (size->second < allowed.min || size->second > allowed.max)) {
            refuse(engine.component + ": dimension " + symbol + " is " +
                   std::to_string(size->second) + "; this engine takes " +
                   std::to_string(allowed.min) + " to " + std::to_string(allowed.max) + ".");
        }
    }
}

}  // namespace

void check_boundary(const Engine& engine, const std::vector<Found>& inputs,
                    const std::vector<Found>& outputs) {
    check_side(engine, "inputs", engine.inputs, inputs);
    check_side(engine, "outputs", engine.outputs, outputs);
}

std::optional<Shape> output_shape(const TensorSpec& spec, const Sizes& sizes) {
    Shape shape;
    for (const Dimension& each : spec.shape) {
        if (const auto* fixed = std::get_if<std::int64_t>(&each)) {
            shape.push_back(*fixed);
            continue;
        }
        const auto size = sizes.find(std::get<std::string>(each));
        if (size == sizes.end()) return std::nullopt;
        shape.push_back(size->second);
    }
    return shape;
}

BoundInputs::BoundInputs(const Engine& engine, const Inputs& resident) : engine_(engine) {
    std::vector<const TensorSpec*> placed;
    for (const TensorSpec& spec : engine.inputs) {
        (resident.count(spec.name) != 0 ? placed : changing_).push_back(&spec);
    }
    if (placed.size() != resident.size()) {
        for (const TensorSpec* spec : changing_) placed.push_back(spec);
    }
    check_inputs(engine, placed, resident, sizes_);
}

Sizes BoundInputs::check(const Inputs& inputs) const {
    Sizes sizes = sizes_;
    check_inputs(engine_, changing_, inputs, sizes);
    return sizes;
}

}  // namespace fluxdeploy
