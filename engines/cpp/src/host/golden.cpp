// The numeric gate: an engine's outputs held against PyTorch's, recorded as golden tensors.
#include <algorithm>
#include <cmath>
#include <limits>
#include <list>

#include "errors.hpp"
#include "files/safetensors.hpp"
#include "host/pipeline.hpp"

namespace fluxdeploy {
namespace {

constexpr std::int64_t kMaxGolden = 256 << 20;  // bytes; a full-size model's have some 10 MiB

[[noreturn]] void refuse(const std::string& golden, const std::string& why) {
    throw Error(ErrorCode::bundle, golden + " " + why);
}

// Compare two arrays of one shape. A value that is not finite is an infinite error.
Deviation compare(const Floats& values, const std::vector<float>& reference) {
    double peak = 0, most = 0, product = 0, own = 0, other = 0;
    bool finite = true, equal = true;
    for (std::size_t i = 0; i < reference.size(); ++i) {
        const double x = values.values[i], r = reference[i];
        finite = finite && std::isfinite(x - r);
        equal = equal && x == r;
        peak = std::max(peak, std::fabs(r));
        most = std::max(most, std::fabs(x - r));
        product += x * r;
        own += x * x;
        other += r * r;
    }
    if (!finite) return {std::numeric_limits<double>::infinity(), -1};
    const double norms = std::sqrt(own) * std::sqrt(other);
    const double cosine = norms != 0 ? std::min(product / norms, 1.0) : (equal ? 1.0 : 0.0);
    return {most / (peak != 0 ? peak : 1), cosine};
}

}  // namespace

Deviation measure_component(Engine& engine, const std::string& golden) {
    const TensorFile file = read_header(golden);
    std::int64_t size = 0;
    for (const auto& [name, entry] : file.tensors) size += entry.nbytes;
    if (size > kMaxGolden) {
        refuse(golden, "holds " + std::to_string(size) + " bytes of tensors; at most " +
                           std::to_string(kMaxGolden) + " are allowed. Rebuild it.");
    }
    std::list<Floats> floats;
    std::list<Ints> ints;
    Inputs inputs;
    std::map<std::string, std::string> outputs;
    for (const auto& [name, entry] : file.tensors) {
        const std::string side = name.substr(0, name.find('.'));
        const std::string tensor = name.substr(std::min(side.size() + 1, name.size()));
        if (side == "output") {
            outputs[tensor] = name;
        } else if (side != "input") {
            refuse(golden, "holds the tensor '" + name + "', which is no input or output.");
        } else if (entry.dtype == "I32") {
            inputs.emplace(tensor, ints.emplace_back(entry.shape, read_int32(file, name)));
        } else {
            inputs.emplace(tensor, floats.emplace_back(entry.shape, read_float32(file, name)));
        }
    }
    const Outputs made = engine.run(inputs);
    const bool same = made.size() == outputs.size() &&
                      std::all_of(made.begin(), made.end(),
                                  [&](const auto& each) { return outputs.count(each.first) != 0; });
    if (!same) {
        refuse(golden, "holds other outputs than " + engine.component + " has. Rebuild it.");
    }
    Deviation worst;
    for (const auto& [tensor, values] : made) {
        const std::string& name = outputs.at(tensor);
        if (file.entry(name).shape != values.shape) {
            refuse(golden, "holds " + tensor + " in another shape than the engine's.");
        }
        const Deviation own = compare(values, read_float32(file, name));
        worst.max_error = std::max(worst.max_error, own.max_error);
        worst.cosine = std::min(worst.cosine, own.cosine);
    }
    return worst;
}

}  // namespace fluxdeploy
