#include "host/components.hpp"

#include <thread>

#include "errors.hpp"
#include "host/batches.hpp"
#include "side_by_side.hpp"

namespace fluxdeploy {
namespace {

constexpr std::int64_t kSmall = std::int64_t{1} << 30;

// Of all files that a bundle records.
std::int64_t bytes(const Manifest& manifest) {
    std::int64_t sum = 0;
    for (const auto& [path, file] : manifest.files()) sum += file.size;
    return sum;
}

// Much of opening a small engine is work of one thread, so they open side by side. The memory that
// large ones take on the way would add up.
std::size_t openers(const Manifest& manifest) {
    if (bytes(manifest) > kSmall) return 1;
    return std::max(std::thread::hardware_concurrency(), 1u);
}

// The places of components in `sizes`: what takes longest to open begins first.
std::vector<std::size_t> largest_first(const std::map<std::string, ComponentRecord>& records,
                                       const AskedSizes& sizes) {
    std::vector<std::size_t> order(sizes.size());
    std::vector<std::int64_t> weight(sizes.size());
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        order[i] = i;
        const auto record = records.find(sizes[i].first);
        if (record == records.end()) continue;
        for (const FileRecord& file : record->second.files) weight[i] += file.size;
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return weight[a] > weight[b]; });
    return order;
}

std::string in_words(const std::string& symbol) {
    static const std::map<std::string, std::string> words{
        {"S", "text tokens (max_sequence_length)"},
        {"L", "image tokens (they grow with height x width)"},
        {"T", "text and image tokens together"},
        {"N", "steps (num_inference_steps)"},
        {"H", "rows of pixels (height)"},
        {"W", "columns of pixels (width)"},
        {"h", "rows of latents (they grow with height)"},
        {"w", "columns of latents (they grow with width)"},
    };
    return words.at(symbol);
}

}  // namespace

void check_range(const std::string& component, const std::string& symbol, std::int64_t size,
                 const DimensionRange& allowed) {
    if (allowed.min <= size && size <= allowed.max) return;
    throw Error(ErrorCode::usage, "This bundle's " + component + " takes " +
                                      std::to_string(allowed.min) + " to " +
                                      std::to_string(allowed.max) + " " + in_words(symbol) +
                                      ", not " + std::to_string(size) +
                                      ". Ask for a size in that range, or build the bundle with a "
                                      "wider one.");
}

void check_finite(const Floats& values, const std::string& component, std::int64_t step,
                  std::int64_t steps) {
    if (all_finite(values.data(), values.size())) return;
    const std::string where =
        step < 0 ? "" : " at step " + std::to_string(step + 1) + " of " + std::to_string(steps);
    throw Error(
        ErrorCode::numeric,
        "The " + component + " gave NaN or infinity" + where +
            ". Use a bundle in a wider precision (bf16 or fp32), or run `fluxdeploy verify` "
            "to see which component is off.");
}

Components::Components(std::shared_ptr<EnginePool> pool, bool low_vram)
    : pool_(std::move(pool)), low_vram_(low_vram) {}

Engine& Components::engine(const std::string& component) {
    auto& held = engines_[component];
    if (!held) held = pool_->open(component);
    return *held;
}

Outputs Components::run(const CancelToken& cancel, const std::string& component,
                        const Inputs& inputs) {
    const auto check = [&] { cancel.check("before the " + component + " ran"); };
    check();
    Outputs outputs = run_in_parts(engine(component), inputs, check);
    for (const auto& [name, values] : outputs) check_finite(values, component);
    return outputs;
}

void Components::release(const std::string& component) {
    if (low_vram_) engines_.erase(component);
}

void Components::release_all() {
    if (low_vram_) engines_.clear();
}

void Components::check_sizes(const CancelToken& cancel, const AskedSizes& sizes) {
    const auto& records = pool_->bundle().manifest.components;
    if (!low_vram_) {
        std::vector<std::shared_ptr<Engine>> opened(sizes.size());
        side_by_side(largest_first(records, sizes), openers(pool_->bundle().manifest),
                     [&](std::size_t i) {
                         cancel.check("before the " + sizes[i].first + " was opened");
                         opened[i] = pool_->open(sizes[i].first);
                     });
        for (std::size_t i = 0; i < sizes.size(); ++i) engines_[sizes[i].first] = opened[i];
    }
    for (const auto& [component, symbols] : sizes) {
        const auto& ranges = low_vram_ ? records.at(component).engines.front().dimensions
                                       : engines_.at(component)->dimensions;
        for (const auto& [symbol, size] : symbols) {
            const auto allowed = ranges.find(symbol);
            if (allowed != ranges.end()) check_range(component, symbol, size, allowed->second);
        }
    }
}

}  // namespace fluxdeploy
