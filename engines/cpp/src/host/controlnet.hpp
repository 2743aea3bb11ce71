// ControlNet: a picture is drawn along control pictures, which networks beside the model read, as
// diffusers' FluxControlNetPipeline has it; with an image as FluxControlNetImg2ImgPipeline, with a
// mask too as FluxControlNetInpaintPipeline.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "host/tasks.hpp"

namespace fluxdeploy {

// Pictures drawn along control pictures, with one set of them for each ControlNet. In step i of n
// one counts where start <= i/n and (i + 1)/n <= end.
class ControlNet : public Task {
public:
    // `plain` is what is drawn without control pictures. Raises `Error` (usage) for what
    // ControlNets of the bundle do not take.
    ControlNet(const Manifest& manifest, const Request& request, const Arguments& arguments,
               std::unique_ptr<Task> plain);

    std::int64_t steps() const override { return plain_->steps(); }
    // Encoders are given one picture at a time, and ControlNets what the transformer is.
    AskedSizes engine_sizes() const override;
    // What does nothing without control pictures, and those that count in no step.
    std::vector<std::string> notices() const override;
    // One generator draws the noise of the posterior of each control picture, for every picture of
    // the batch, and then what is drawn without them; for ControlNets that take pixels nothing is
    // drawn.
    Start prepare(const std::vector<float>& sigmas, Generators& generators,
                  const Run& run) const override;

private:
    // What one ControlNet is given: pictures [Bc, 3, H, W], and how it counts.
    struct Controlled {
        ControlNetRecord record;
        Floats images;
        std::optional<std::int64_t> mode;
        double scale;
        double start;
        double end;
    };

    std::vector<float> scales(const Controlled& given) const;
    bool takes_pixels(const ControlNetRecord& record) const;

    const Manifest& manifest_;
    const Request& request_;
    std::unique_ptr<Task> plain_;
    std::vector<Controlled> given_;
};

}  // namespace fluxdeploy
