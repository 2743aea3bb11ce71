// From a prompt to pictures: a bundle's engines, and all that lies between them.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "host/cancel.hpp"
#include "host/components.hpp"
#include "host/prompts.hpp"
#include "host/request.hpp"

namespace fluxdeploy {

// What a call made: 8 bits RGB [B, H, W, 3]; the seed that makes it again, where there is one; how
// many steps it took; sentences on what did nothing and what was cut.
struct Result {
    std::int64_t count = 0;
    std::int64_t height = 0;
    std::int64_t width = 0;
    std::vector<std::uint8_t> pixels;
    std::optional<std::uint64_t> seed;
    std::int64_t steps = 0;
    std::vector<std::string> notices;
};

// How far an engine's outputs are from the golden ones.
struct Deviation {
    double max_error = 0;
    double cosine = 1;
};

// What the pipelines of a bundle share.
struct OpenedBundle {
    std::shared_ptr<EnginePool> pool;
    std::shared_ptr<const Tokenizers> tokenizers;
};

// Makes pictures from a bundle. Calls from several threads take turns; a clone shares the engines,
// and runs at the same time.
class FluxPipeline {
public:
    // Open the bundle in the folder `path`, to be run by `runtime`. Raises `Error` (bundle) where
    // the folder is no bundle that this version reads, `Error` (usage) for options that cannot be.
    FluxPipeline(const std::string& path, const std::string& runtime, EngineOptions options,
                 bool low_vram);

    std::unique_ptr<FluxPipeline> clone() const;

    const Bundle& bundle() const { return pool_->bundle(); }
    const Tokenizers& tokenizers() const { return *tokenizers_; }

    // Open the engines that every picture takes.
    void load();

    // Make the pictures of a call. Raises `Error`: (usage) for an argument outside its range,
    // (numeric) where a component gave NaN or infinity, (cancelled), (engine) where one fails.
    Result generate(const Arguments& arguments);

    // Hold the components against their golden tensors, and tell `each` of them. Raises `Error`
    // (numeric) at the first that is past its gate.
    void check(const std::function<void(const std::string&, const Deviation&)>& each);

private:
    FluxPipeline(OpenedBundle opened, bool low_vram);

    // What the prompts make of the transformer, towards them and away from the negative ones, and
    // of each ControlNet that counts in some step.
    struct Conditions {
        Condition towards;
        std::optional<Condition> away;
        std::vector<Condition> controls;
    };

    Result make(const Request& request, const class Task& task, const Arguments& arguments);
    // With `levels`, the noise levels at which the velocity is taken.
    Conditions condition_all(const Request& request, const struct Start& start,
                             const std::vector<float>& levels, const Run& run);
    // Make the steps, of which `first` is the first in the whole schedule, in place.
    void draw(struct Start& start, Conditions conditions, const Request& request,
              const Arguments& arguments, std::int64_t first);
    void decode(const Floats& tokens, const Request& request, const Run& run,
                const CancelToken& cancel, std::vector<std::uint8_t>& pixels);

    std::shared_ptr<EnginePool> pool_;
    std::shared_ptr<const Tokenizers> tokenizers_;
    Turns turns_;
    Components components_;
    PromptEncoder encoder_;
};

// Run an engine on the inputs of a golden file. Raises `Error` (bundle) for a file that does not
// fit the component.
Deviation measure_component(Engine& engine, const std::string& golden);

}  // namespace fluxdeploy
