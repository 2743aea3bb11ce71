// The arguments of a generation, checked before anything runs.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "files/manifest.hpp"
#include "files/png.hpp"
#include "host/cancel.hpp"
#include "host/components.hpp"
#include "host/texts.hpp"
#include "sampling/skipping.hpp"

namespace fluxdeploy {

// Small pictures of one size, RGB in 8 bits, one after the other.
struct PreviewPictures {
    std::int64_t height = 0;
    std::int64_t width = 0;
    std::vector<std::uint8_t> rgb;
};

// After a step: its index, the number of steps, the noise level that it began at, the live latents
// [B, L, C], which may be changed, and previews where they are asked for, else null. Returns
// whether to go on.
using StepCallback = std::function<bool(std::int64_t step, std::int64_t steps, float sigma,
                                        Floats& latents, const PreviewPictures* previews)>;

// Height and width of pictures, where they are asked for.
struct AskedSize {
    std::optional<std::int64_t> height;
    std::optional<std::int64_t> width;
};

// What `control_mode` has for a ControlNet that knows one kind of control.
inline constexpr std::int64_t kNoMode = -1;
// What ControlNets do where the caller says nothing.
inline constexpr double kControlScale = 1, kControlStart = 0, kControlEnd = 1;

// What a caller says; what is empty has the bundle's default.
struct Arguments {
    Words words;
    Words negative_words;
    double true_cfg_scale = 1.0;
    std::optional<std::int64_t> height;
    std::optional<std::int64_t> width;
    std::optional<std::int64_t> num_inference_steps;
    std::optional<double> guidance_scale;
    std::int64_t num_images_per_prompt = 1;
    std::optional<std::int64_t> max_sequence_length;
    std::optional<std::uint64_t> seed;
    // One for each picture, in place of one for all.
    std::vector<std::uint64_t> seeds;
    std::optional<std::vector<float>> latents;
    std::vector<Picture> images;
    std::vector<Picture> mask_images;
    std::optional<double> strength;
    std::optional<std::int64_t> padding_mask_crop;
    // Of every picture that is drawn after some, so many of `images`, one after the other.
    std::int64_t references = 1;
    // Those of each ControlNet; of a model that reads them itself, the first has all.
    std::vector<std::vector<Picture>> control_images;
    // Of ControlNets, one for all or one for each.
    std::vector<std::int64_t> control_mode;
    std::vector<double> controlnet_conditioning_scale;
    std::vector<double> control_guidance_start;
    std::vector<double> control_guidance_end;
    std::optional<std::int64_t> max_area;
    bool auto_resize = true;
    std::string sampler = "euler";
    // Noise levels before shifting, one a step; the schedule's where there are none.
    std::vector<float> sigmas;
    // Steps in which the velocity is extrapolated, or whether they are the bundle's record's.
    std::vector<std::int64_t> skip;
    bool skip_recorded = false;
    StepCallback on_step_end;
    // Whether the callback is given previews.
    bool preview = false;
    CancelToken cancel;
};

// What to generate, defaults filled in: for each prompt, `num_images_per_prompt` pictures.
// `negative` has as many as `text`, and is nothing where true CFG is off. `latents` are the
// caller's, [B, L, C], packed. There is a seed for all pictures, or one for each, and none where
// nothing is drawn beside latents. `sigmas` are the caller's noise levels before shifting, or none.
// `skip` counts the steps of the whole schedule.
struct Request {
    Text text;
    std::optional<Text> negative;
    double true_cfg_scale = 1.0;
    std::int64_t height = 0;
    std::int64_t width = 0;
    std::int64_t num_inference_steps = 0;
    double guidance_scale = 0;
    std::int64_t num_images_per_prompt = 1;
    std::int64_t max_sequence_length = 0;
    std::vector<std::uint64_t> seeds;
    std::optional<Floats> latents;
    std::string sampler;
    std::vector<float> sigmas;
    Skips skip;

    // B: the number of pictures.
    std::int64_t batch() const { return text.size() * num_images_per_prompt; }

    // What each component is asked for. `levels` are the noise levels at which the velocity is
    // taken. The VAE decoder comes first: of all ranges that a size can miss, its are the clearest.
    AskedSizes engine_sizes(const Manifest& manifest, std::int64_t levels) const;
};

// The request that arguments make. `size` takes the place of the arguments'. `drawing`: whether
// random numbers are drawn at all; a seed is then drawn by the system where none is given. Raises
// `Error` (usage) for a value outside its range.
Request check_request(const Manifest& manifest, const Arguments& arguments, const AskedSize& size,
                      bool drawing);

// A sentence for each argument that does nothing beside the others. They have passed the check.
std::vector<std::string> idle_arguments(const Manifest& manifest, const Arguments& arguments,
                                        bool drawing);

}  // namespace fluxdeploy
