#include "host/batches.hpp"

#include <algorithm>
#include <list>
#include <optional>

namespace fluxdeploy {
namespace {

// The axis of a tensor that is the batch, if any.
std::optional<std::size_t> batch_axis(const TensorSpec& spec) {
    for (std::size_t axis = 0; axis < spec.shape.size(); ++axis) {
        const auto* symbol = std::get_if<std::string>(&spec.shape[axis]);
        if (symbol != nullptr && *symbol == "B") return axis;
    }
    return std::nullopt;
}

// How an array lies around an axis: `outer` runs of rows, each of `inner` numbers.
struct Layout {
    std::int64_t outer = 1;
    std::int64_t inner = 1;
};

Layout around(const Shape& shape, std::size_t axis) {
    Layout layout;
    for (std::size_t i = 0; i < shape.size(); ++i) {
        if (i != axis) (i < axis ? layout.outer : layout.inner) *= shape[i];
    }
    return layout;
}

template <class T>
Array<T> rows(const T* values, Shape shape, std::size_t axis, BatchPart part) {
    const Layout layout = around(shape, axis);
    const std::int64_t batch = shape[axis];
    shape[axis] = part.size();
    Array<T> taken(std::move(shape));
    for (std::int64_t run = 0; run < layout.outer; ++run) {
        const T* from = values + (run * batch + part.start) * layout.inner;
        std::copy(from, from + part.size() * layout.inner,
                  taken.data() + run * part.size() * layout.inner);
    }
    return taken;
}

void put_rows(const Floats& values, Floats& whole, std::size_t axis, BatchPart part) {
    const Layout layout = around(whole.shape, axis);
    for (std::int64_t run = 0; run < layout.outer; ++run) {
        const float* from = values.data() + run * part.size() * layout.inner;
        std::copy(from, from + part.size() * layout.inner,
                  whole.data() + (run * whole.shape[axis] + part.start) * layout.inner);
    }
}

}  // namespace

std::vector<BatchPart> divide(const Engine& engine, std::int64_t batch) {
    const auto allowed = engine.dimensions.find("B");
    const std::int64_t most = allowed == engine.dimensions.end() ? batch : allowed->second.max;
    const std::int64_t number = (batch + most - 1) / most;
    std::vector<BatchPart> parts;
    for (std::int64_t part = 0; part < number; ++part) {
        parts.push_back({batch * part / number, batch * (part + 1) / number});
    }
    return parts;
}

Outputs run_in_parts(Engine& engine, const Inputs& inputs, const std::function<void()>& between) {
    std::map<std::string, std::size_t> axes;
    std::int64_t batch = 0;
    for (const TensorSpec& spec : engine.inputs) {
        const auto axis = batch_axis(spec);
        const auto input = inputs.find(spec.name);
        if (!axis || input == inputs.end() || input->second.shape().size() <= *axis) continue;
        axes[spec.name] = *axis;
        batch = input->second.shape()[*axis];
    }
    if (batch == 0) return engine.run(inputs);
    const std::vector<BatchPart> parts = divide(engine, batch);
    if (parts.size() == 1) return engine.run(inputs);
    Outputs whole;
    for (const BatchPart& part : parts) {
        if (!whole.empty()) between();
        std::list<Floats> floats;
        std::list<Ints> ints;
        Inputs taken;
        for (const auto& [name, view] : inputs) {
            const auto axis = axes.find(name);
            if (axis == axes.end()) {
                taken.emplace(name, view);
            } else if (view.floats() != nullptr) {
                floats.push_back(rows(view.floats(), view.shape(), axis->second, part));
                taken.emplace(name, floats.back());
            } else {
                ints.push_back(rows(view.ints(), view.shape(), axis->second, part));
                taken.emplace(name, ints.back());
            }
        }
        for (auto& [name, values] : engine.run(taken)) {
            const auto spec =
                std::find_if(engine.outputs.begin(), engine.outputs.end(),
                             [&](const TensorSpec& each) { return each.name == name; });
            const std::size_t axis = batch_axis(*spec).value_or(0);
            if (whole.count(name) == 0) {
                Shape shape = values.shape;
                shape[axis] = batch;
                whole[name] = Floats(std::move(shape));
            }
            put_rows(values, whole[name], axis, part);
        }
    }
    return whole;
}

}  // namespace fluxdeploy
