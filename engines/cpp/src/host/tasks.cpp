#include "host/tasks.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "arguments.hpp"
#include "errors.hpp"
#include "host/controlnet.hpp"
#include "host/encoding.hpp"
#include "host/input_images.hpp"
#include "sampling/latents.hpp"
#include "sampling/noise.hpp"
#include "sampling/schedule.hpp"

namespace fluxdeploy {
namespace {

// Arrays [B, L, C] and [B, L, C'] side by side.
Floats beside(const Floats& first, const Floats& second) {
    const std::int64_t one = first.shape[2], other = second.shape[2];
    Floats both({first.shape[0], first.shape[1], one + other});
    float* to = both.data();
    for (std::int64_t at = 0; at < first.shape[0] * first.shape[1]; ++at) {
        to = std::copy(first.data() + at * one, first.data() + (at + 1) * one, to);
        to = std::copy(second.data() + at * other, second.data() + (at + 1) * other, to);
    }
    return both;
}

std::vector<float> last_levels(const std::vector<float>& sigmas, std::int64_t steps) {
    return {sigmas.end() - (steps + 1), sigmas.end()};
}

// The whole schedule, from noise.
class TextToImage : public Task {
public:
    TextToImage(const Manifest& manifest, const Request& request)
        : manifest_(manifest), request_(request) {}

    std::int64_t steps() const override { return request_.num_inference_steps; }

    Start prepare(const std::vector<float>& sigmas, Generators& generators,
                  const Run&) const override {
        return {start_noise(request_, manifest_.latents, generators), sigmas, {}, {}, {}, {}};
    }

private:
    const Manifest& manifest_;
    const Request& request_;
};

// The noise levels that are left, and what draws for them.
struct Noised {
    std::vector<float> sigmas;
    Floats known;  // [B, C, h, w], as `noise`
    Floats noise;
};

// From a noised picture through the rest of the schedule, as diffusers' FluxImg2ImgPipeline, after
// SDEdit (arXiv 2108.01073). Picture k of the B begins with image k modulo their number.
class ImageToImage : public Task {
public:
    ImageToImage(const Manifest& manifest, const Request& request, const Arguments& arguments)
        : manifest_(manifest), request_(request) {
        strength_ =
            check_number("strength", arguments.strength.value_or(manifest.defaults.strength), 0, 1);
        images_ = to_pixels(arguments.images, request.height, request.width);
        check_divides(arguments.images.size(), request, "images");
        if (steps() < 1) {
            throw Error(ErrorCode::usage, "At strength " + general(strength_) + " none of " +
                                              std::to_string(request.num_inference_steps) +
                                              " steps is left. Raise `strength` or "
                                              "`num_inference_steps`.");
        }
    }

    // The steps after the one that the noised picture stands for.
    std::int64_t steps() const override {
        return request_.num_inference_steps - first_step(request_.num_inference_steps, strength_);
    }

    AskedSizes engine_sizes() const override {
        return encoder_sizes(request_.height, request_.width, manifest_.latents);
    }

    std::vector<std::string> notices() const override {
        if (request_.latents) {
            return {"`image` does nothing beside `latents`, which are taken for the noised image."};
        }
        if (steps() == request_.num_inference_steps) {
            return {"`image` does nothing: at strength " + general(strength_) + " all of the " +
                    std::to_string(steps()) +
                    " steps are made, from noise alone. Lower `strength`, or raise "
                    "`num_inference_steps`."};
        }
        return {};
    }

    Start prepare(const std::vector<float>& sigmas, Generators& generators,
                  const Run& run) const override {
        if (request_.latents) {
            return {*request_.latents, last_levels(sigmas, steps()), {}, {}, {}, {}};
        }
        return start(noised(sigmas, generators, run));
    }

protected:
    // Raise `Error` (usage) unless the number of pictures made is a multiple of those `given`.
    static void check_divides(std::size_t given, const Request& request, const std::string& what) {
        if (request.batch() % static_cast<std::int64_t>(given) == 0) return;
        throw Error(ErrorCode::usage, "There are " + std::to_string(given) + " " + what + " for " +
                                          std::to_string(request.batch()) +
                                          " pictures. Give one for all, or as many as divide "
                                          "that number.");
    }

    // A generator draws the noise of the encoder's posterior first, and then the noise that the
    // picture is mixed with.
    Noised noised(const std::vector<float>& sigmas, Generators& generators, const Run& run) const {
        const Floats epsilon = generators.normal(latents_of(images_.shape[0]));
        const Floats known = known_latents(images_, epsilon, manifest_.latents, run);
        return {last_levels(sigmas, steps()), repeat(known, request_.batch()),
                generators.normal(latents_of(request_.batch()))};
    }

    Start start(const Noised& noised) const {
        const Floats mixed = scale_noise(noised.known, noised.noise, noised.sigmas.front());
        return {pack(mixed, manifest_.latents), noised.sigmas, {}, {}, {}, {}};
    }

    Shape latents_of(std::int64_t batch) const {
        return latent_shape(batch, request_.height, request_.width, manifest_.latents);
    }

    const Manifest& manifest_;
    const Request& request_;
    Floats images_;

private:
    double strength_ = 0;
};

// The marked part of a picture is drawn again, the rest is held to what it was, as diffusers'
// FluxInpaintPipeline does for any text-to-image checkpoint: after each step, what is not marked
// becomes the given picture again, noised to the level that the step ended at. Picture k of the B
// has mask k modulo their number.
class Inpainting : public ImageToImage {
public:
    // `crop` is what `arguments` has the parts of, with `padding_mask_crop`.
    Inpainting(const Manifest& manifest, const Request& request, const Arguments& arguments,
               std::optional<MaskCrop> crop)
        : ImageToImage(manifest, request, arguments),
          masks_(static_cast<std::int64_t>(arguments.mask_images.size())),
          crop_(std::move(crop)),
          marked_(to_masks(arguments.mask_images, request.height, request.width)) {
        check_divides(arguments.mask_images.size(), request, "masks");
    }

    const MaskCrop* crop() const override { return crop_ ? &*crop_ : nullptr; }

    // A mask does nothing where no latent is marked.
    std::vector<std::string> notices() const override {
        const Shape latents = latents_of(1);
        for (std::int64_t mask = 0; mask < masks_; ++mask) {
            bool any = false;
            for (std::int64_t at = 0; at < latents[2] * latents[3]; ++at) {
                any = any || marked(mask, at / latents[3], at % latents[3]);
            }
            if (any) continue;
            const std::string side = std::to_string(manifest_.latents.spatial_factor);
            return {"`mask_image` marks nothing that can be redrawn: of the first pixel of each " +
                    side + "x" + side + ", none is white. Mark more."};
        }
        return {};
    }

    Start prepare(const std::vector<float>& sigmas, Generators& generators,
                  const Run& run) const override {
        const LatentSpec& spec = manifest_.latents;
        const Noised own = noised(sigmas, generators, run);
        Floats kept(latents_of(request_.batch()));
        const Shape& shape = kept.shape;
        for (std::int64_t at = 0; at < kept.size(); ++at) {
            const std::int64_t column = at % shape[3];
            const std::int64_t row = at / shape[3] % shape[2];
            const std::int64_t picture = at / (shape[1] * shape[2] * shape[3]);
            kept.values[static_cast<std::size_t>(at)] =
                marked(picture % masks_, row, column) ? 0.0f : 1.0f;
        }
        Start begun = start(own);
        begun.blend = [levels = own.sigmas, known = pack(own.known, spec),
                       noise = pack(own.noise, spec),
                       held = pack(kept, spec)](std::int64_t step, Floats& latents) {
            const float level = levels[static_cast<std::size_t>(step) + 1];
            for (std::size_t i = 0; i < latents.values.size(); ++i) {
                if (held.values[i] == 0.0f) continue;
                latents.values[i] = noise.values[i] * level + known.values[i] * (1.0f - level);
            }
        };
        return begun;
    }

protected:
    // Whether mask `mask` marks a pixel.
    bool marks(std::int64_t mask, std::int64_t row, std::int64_t column) const {
        const std::int64_t line = mask * request_.height + row;
        return marked_[static_cast<std::size_t>(line * request_.width + column)];
    }

    std::int64_t masks_;

private:
    // What the first pixel of a latent says.
    bool marked(std::int64_t mask, std::int64_t row, std::int64_t column) const {
        const std::int64_t side = manifest_.latents.spatial_factor;
        return marks(mask, row * side, column * side);
    }

    std::optional<MaskCrop> crop_;
    std::vector<bool> marked_;
};

// What is drawn in the marked part, by a transformer that sees the rest of the picture, as
// diffusers' FluxFillPipeline: beside the latents stand those of the picture without its marked
// part, and the mask. Nothing is held to what it was.
class Fill : public Inpainting {
public:
    using Inpainting::Inpainting;

    // A mask does nothing where no pixel is marked.
    std::vector<std::string> notices() const override {
        for (std::int64_t mask = 0; mask < masks_; ++mask) {
            bool any = false;
            for (std::int64_t at = 0; at < request_.height * request_.width; ++at) {
                any = any || marks(mask, at / request_.width, at % request_.width);
            }
            if (any) continue;
            return {
                "`mask_image` marks nothing that is to be drawn: no pixel is white. Mark more."};
        }
        return {};
    }

    Start prepare(const std::vector<float>& sigmas, Generators& generators,
                  const Run& run) const override {
        const LatentSpec& spec = manifest_.latents;
        const std::vector<float> levels = last_levels(sigmas, steps());
        Floats begun;
        if (request_.latents) {
            begun = *request_.latents;
        } else if (levels.front() == 1.0f) {
            // Nothing is left of the picture; its draw comes before the others all the same.
            generators.normal(latents_of(images_.shape[0]));
            begun = start_noise(request_, spec, generators);
        } else {
            begun = start(noised(sigmas, generators, run)).latents;
        }
        return {std::move(begun), levels, {}, channels(generators, run), {}, {}};
    }

private:
    Floats channels(Generators& generators, const Run& run) const {
        const LatentSpec& spec = manifest_.latents;
        // As many as there are pairs of an image and a mask.
        const Floats hidden = hide(std::lcm(images_.shape[0], masks_));
        const Floats epsilon = generators.normal(latents_of(hidden.shape[0]));
        const Floats known = known_latents(hidden, epsilon, spec, run);
        return beside(pack(repeat(known, request_.batch()), spec), mask_channels());
    }

    // `count` pictures with 0 where they are marked.
    Floats hide(std::int64_t count) const {
        Floats hidden = repeat(images_, count);
        const std::int64_t plane = request_.height * request_.width;
        for (std::int64_t at = 0; at < hidden.size(); ++at) {
            const std::int64_t pixel = at % plane;
            if (marks(at / (3 * plane) % masks_, pixel / request_.width, pixel % request_.width)) {
                hidden.values[static_cast<std::size_t>(at)] = 0.0f;
            }
        }
        return hidden;
    }

    // The pixels that a latent stands for are its channels, row by row, packed as latents are.
    Floats mask_channels() const {
        LatentSpec spec = manifest_.latents;
        const std::int64_t side = spec.spatial_factor;
        spec.channels = side * side;
        Floats folded(latent_shape(masks_, request_.height, request_.width, spec));
        const Shape& shape = folded.shape;
        for (std::int64_t at = 0; at < folded.size(); ++at) {
            const std::int64_t column = at % shape[3];
            const std::int64_t row = at / shape[3] % shape[2];
            const std::int64_t channel = at / (shape[2] * shape[3]) % shape[1];
            const std::int64_t mask = at / (shape[1] * shape[2] * shape[3]);
            folded.values[static_cast<std::size_t>(at)] =
                marks(mask, row * side + channel / side, column * side + channel % side) ? 1.0f
                                                                                         : 0.0f;
        }
        return repeat(pack(folded, spec), request_.batch());
    }
};

// A picture along the edges or the depths of another one, as diffusers' FluxControlPipeline: beside
// the latents stand those of the control picture, drawn for every picture of the batch.
class Control : public Task {
public:
    Control(const Manifest& manifest, const Request& request, const Arguments& arguments)
        : manifest_(manifest),
          request_(request),
          images_(read_controls(arguments.control_images.front(), request)) {
        if (arguments.control_images.size() == 1) return;
        throw Error(ErrorCode::usage,
                    "There are control images of several ControlNets, and this bundle has none. "
                    "Give those of the first alone.");
    }

    std::int64_t steps() const override { return request_.num_inference_steps; }

    AskedSizes engine_sizes() const override {
        return encoder_sizes(request_.height, request_.width, manifest_.latents);
    }

    Start prepare(const std::vector<float>& sigmas, Generators& generators,
                  const Run& run) const override {
        const LatentSpec& spec = manifest_.latents;
        Floats known = control_latents(images_, request_.batch(), spec, generators, run);
        Floats noise = start_noise(request_, spec, generators);
        return {std::move(noise), sigmas, {}, std::move(known), {}, {}};
    }

private:
    const Manifest& manifest_;
    const Request& request_;
    Floats images_;
};

struct Size {
    std::int64_t height = 0;
    std::int64_t width = 0;
};

// The largest size in whole tokens that is no larger, and at least a token.
Size whole(const Manifest& manifest, std::int64_t height, std::int64_t width) {
    const std::int64_t side = manifest.latents.token_side();
    return {std::max(side, height / side * side), std::max(side, width / side * side)};
}

// A half goes to the even one, as Python's `round` has it.
std::int64_t rounded_even(double value) { return static_cast<std::int64_t>(std::nearbyint(value)); }

constexpr double kTrainedArea = 1024.0 * 1024.0;
// Widths and heights of the references that FLUX.1 Kontext was trained with.
constexpr std::int64_t kTrainedSizes[][2] = {
    {672, 1568}, {688, 1504}, {720, 1456},  {752, 1392}, {800, 1328}, {832, 1248},
    {880, 1184}, {944, 1104}, {1024, 1024}, {1104, 944}, {1184, 880}, {1248, 832},
    {1328, 800}, {1392, 752}, {1456, 720},  {1504, 688}, {1568, 672}};

// The training size that is nearest in proportions; where the bundle's pictures are smaller or
// larger than FLUX.1's, it is as much smaller or larger.
Size trained_size(const Manifest& manifest, double aspect) {
    const std::int64_t* best = kTrainedSizes[0];
    double least = std::numeric_limits<double>::infinity();
    for (const auto& size : kTrainedSizes) {
        const double off =
            std::abs(aspect - static_cast<double>(size[0]) / static_cast<double>(size[1]));
        if (off < least) {
            least = off;
            best = size;
        }
    }
    const Defaults& defaults = manifest.defaults;
    const double area = static_cast<double>(defaults.height * defaults.width);
    const double ratio = std::sqrt(area / kTrainedArea);
    return {rounded_even(static_cast<double>(best[1]) * ratio),
            rounded_even(static_cast<double>(best[0]) * ratio)};
}

// The size of every reference, in whole tokens: those of the first picture's.
std::vector<Size> reference_sizes(const Manifest& manifest, const Arguments& arguments) {
    const std::int64_t count = check_integer("references", arguments.references, 1);
    const auto images = static_cast<std::int64_t>(arguments.images.size());
    if (images % count != 0) {
        throw Error(ErrorCode::usage, "There are " + std::to_string(images) + " images for " +
                                          std::to_string(count) +
                                          " references of each picture. Give as many for every "
                                          "picture.");
    }
    std::vector<Size> sizes;
    for (std::int64_t place = 0; place < count; ++place) {
        const Picture& image = arguments.images[static_cast<std::size_t>(place)];
        check_pixels(image);
        Size size{image.height, image.width};
        if (arguments.auto_resize) {
            size = trained_size(
                manifest, static_cast<double>(image.width) / static_cast<double>(image.height));
        }
        sizes.push_back(whole(manifest, size.height, size.width));
    }
    return sizes;
}

// A picture after reference pictures, changed as the prompt says, as diffusers'
// FluxKontextPipeline: the references' tokens stand behind the latents in every step.
class Kontext : public Task {
public:
    Kontext(const Manifest& manifest, const Request& request, const Arguments& arguments)
        : manifest_(manifest), request_(request) {
        const std::vector<Size> sizes = reference_sizes(manifest, arguments);
        const std::size_t pictures = arguments.images.size() / sizes.size();
        if (request.batch() % static_cast<std::int64_t>(pictures) != 0) {
            throw Error(ErrorCode::usage,
                        "There are " + std::to_string(pictures) + " images for " +
                            std::to_string(request.batch()) +
                            " pictures. Give one for all, or as many as divide that number.");
        }
        for (std::size_t place = 0; place < sizes.size(); ++place) {
            std::vector<Picture> images;
            for (std::size_t picture = 0; picture < pictures; ++picture) {
                images.push_back(arguments.images[picture * sizes.size() + place]);
            }
            references_.push_back(to_pixels(images, sizes[place].height, sizes[place].width));
        }
    }

    std::int64_t steps() const override { return request_.num_inference_steps; }

    AskedSizes engine_sizes() const override {
        const LatentSpec& spec = manifest_.latents;
        std::int64_t height = 0, width = 0;
        for (const Floats& images : references_) {
            height = std::max(height, images.shape[2]);
            width = std::max(width, images.shape[3]);
        }
        const TokenGrid own = token_grid(request_.height, request_.width, spec);
        std::int64_t tokens = own.rows * own.columns;
        for (const TokenGrid& grid : grids()) tokens += grid.rows * grid.columns;
        AskedSizes sizes = encoder_sizes(height, width, spec);
        sizes.push_back(
            {"transformer", {{"L", tokens}, {"T", request_.max_sequence_length + tokens}}});
        return sizes;
    }

    Start prepare(const std::vector<float>& sigmas, Generators& generators,
                  const Run& run) const override {
        const LatentSpec& spec = manifest_.latents;
        const std::int64_t batch = request_.batch();
        std::vector<Floats> parts;
        std::int64_t length = 0;
        for (const Floats& images : references_) {
            Floats mean = encode(images, spec, run).first;
            scale(mean, spec);
            parts.push_back(repeat(pack(mean, spec), batch));
            length += parts.back().shape[1];
        }
        Floats tokens({batch, length, spec.token_channels()});
        float* to = tokens.data();
        for (std::int64_t picture = 0; picture < batch; ++picture) {
            for (const Floats& part : parts) {
                const std::int64_t width = part.size() / batch;
                const float* from = part.data() + picture * width;
                to = std::copy(from, from + width, to);
            }
        }
        Floats noise = start_noise(request_, spec, generators);
        return {std::move(noise), sigmas, {}, {}, std::move(tokens), grids()};
    }

private:
    std::vector<TokenGrid> grids() const {
        std::vector<TokenGrid> found;
        for (const Floats& images : references_) {
            found.push_back(token_grid(images.shape[2], images.shape[3], manifest_.latents));
        }
        return found;
    }

    const Manifest& manifest_;
    const Request& request_;
    std::vector<Floats> references_;
};

}  // namespace

AskedSize asked_size(const Manifest& manifest, const Arguments& arguments) {
    AskedSize asked{arguments.height, arguments.width};
    if (!manifest.does("kontext") || arguments.images.empty()) return asked;
    if (!asked.height && !asked.width) {
        const Size first = reference_sizes(manifest, arguments).front();
        asked = {first.height, first.width};
    }
    if (!arguments.max_area) return asked;
    const std::int64_t side = manifest.latents.token_side();
    const auto area = static_cast<double>(
        check_integer("max_area", *arguments.max_area, side * side, kMaxPixels));
    const double height = static_cast<double>(
        check_integer("height", asked.height.value_or(manifest.defaults.height)));
    const double width =
        static_cast<double>(check_integer("width", asked.width.value_or(manifest.defaults.width)));
    const double aspect = width / height;
    const Size size = whole(manifest, rounded_even(std::sqrt(area / aspect)),
                            rounded_even(std::sqrt(area * aspect)));
    return {size.height, size.width};
}

namespace {

// What of a call asks for a task, or belongs to some.
struct TaskWords {
    const char* task;
    std::vector<std::string> chosen_by;
    std::vector<std::string> options;
    // Whether it draws random numbers beside the noise that `latents` stand for.
    bool draws_more = false;
};

// The options of ControlNets, after those of the task that they run beside.
std::vector<std::string> controlled(std::vector<std::string> options) {
    for (const char* own : {"control_mode", "controlnet_conditioning_scale",
                            "control_guidance_start", "control_guidance_end"}) {
        options.push_back(own);
    }
    return options;
}

const std::vector<TaskWords>& task_words() {
    static const std::vector<TaskWords> all{
        {"text to image", {}, {}},
        {"image to image", {"image"}, {"strength"}},
        {"inpainting", {"image", "mask_image"}, {"strength", "padding_mask_crop"}},
        {"fill", {"image", "mask_image"}, {"strength", "padding_mask_crop"}, true},
        {"control", {"control_image"}, {}, true},
        {"kontext", {"image"}, {"max_area", "auto_resize"}},
        {"controlnet", {"control_image"}, controlled({}), true},
        {"controlnet", {"control_image", "image"}, controlled({"strength"}), true},
        {"controlnet",
         {"control_image", "image", "mask_image"},
         controlled({"strength", "padding_mask_crop"})},
    };
    return all;
}

bool has(const std::vector<std::string>& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

bool all_in(const std::vector<std::string>& names, const std::vector<std::string>& given) {
    return std::all_of(names.begin(), names.end(),
                       [&](const std::string& name) { return has(given, name); });
}

std::string joined(const std::vector<std::string>& words, const std::string& between) {
    std::string all;
    for (const std::string& word : words) all += (all.empty() ? "" : between) + word;
    return all;
}

std::string quoted(const std::vector<std::string>& names) {
    std::vector<std::string> words;
    for (const std::string& name : names) words.push_back("`" + name + "`");
    return joined(words, " and ");
}

// The tasks, each with what asks for it.
std::string ways(const std::vector<const TaskWords*>& tasks) {
    std::vector<std::string> words;
    for (const TaskWords* each : tasks) {
        words.push_back(each->chosen_by.empty()
                            ? std::string(each->task)
                            : std::string(each->task) + " (with " + quoted(each->chosen_by) + ")");
    }
    return joined(words, ", ");
}

std::vector<std::string> given_names(const Arguments& arguments) {
    std::vector<std::string> names;
    if (!arguments.images.empty()) names.push_back("image");
    if (!arguments.mask_images.empty()) names.push_back("mask_image");
    if (arguments.strength) names.push_back("strength");
    if (arguments.padding_mask_crop) names.push_back("padding_mask_crop");
    if (!arguments.control_images.empty()) names.push_back("control_image");
    if (arguments.control_mode != std::vector<std::int64_t>{kNoMode} &&
        !arguments.control_mode.empty()) {
        names.push_back("control_mode");
    }
    const auto said = [&](const char* name, const std::vector<double>& values, double usual) {
        if (!values.empty() && values != std::vector<double>{usual}) names.push_back(name);
    };
    said("controlnet_conditioning_scale", arguments.controlnet_conditioning_scale, kControlScale);
    said("control_guidance_start", arguments.control_guidance_start, kControlStart);
    said("control_guidance_end", arguments.control_guidance_end, kControlEnd);
    if (arguments.max_area) names.push_back("max_area");
    if (!arguments.auto_resize) names.push_back("auto_resize");
    return names;
}

// Why no task of the bundle takes an argument.
[[noreturn]] void refuse(const std::vector<const TaskWords*>& own, const TaskWords& task,
                         const std::string& name) {
    std::vector<std::string> wanted;
    for (const TaskWords* other : own) {
        if (!has(other->chosen_by, name)) continue;
        wanted.push_back(std::string(other->task) + " takes " + quoted(other->chosen_by));
    }
    const std::string place = "`" + name + "` has no place in " + task.task + ": ";
    if (!wanted.empty()) {
        throw Error(ErrorCode::usage, place + joined(wanted, "; ") + ". Give what one task takes.");
    }
    std::vector<std::string> others;
    for (const TaskWords& other : task_words()) {
        if (has(others, other.task)) continue;  // the same with other things beside it
        if (has(other.chosen_by, name) || has(other.options, name)) others.push_back(other.task);
    }
    throw Error(ErrorCode::usage, place + "it is for " + joined(others, " and ") +
                                      ", and this bundle's model is one for " + ways(own) +
                                      ". Leave it out, or build a checkpoint that is.");
}

// The tasks that a bundle does.
std::vector<const TaskWords*> own_tasks(const Manifest& manifest) {
    std::vector<const TaskWords*> own;
    for (const TaskWords& each : task_words()) {
        if (manifest.does(each.task)) own.push_back(&each);
    }
    return own;
}

// The one that is asked for by most of what is given.
const TaskWords& asked_task(const std::vector<const TaskWords*>& own,
                            const std::vector<std::string>& given) {
    const TaskWords* task = nullptr;
    for (const TaskWords* each : own) {
        if (!all_in(each->chosen_by, given)) continue;
        if (!task || each->chosen_by.size() > task->chosen_by.size()) task = each;
    }
    if (!task) {
        throw Error(ErrorCode::usage,
                    "This bundle's model is one for " + ways(own) + ". Give what it takes.");
    }
    return *task;
}

// What draws along nothing: with pictures, or from noise alone.
std::unique_ptr<Task> plain_task(const Manifest& manifest, const Request& request,
                                 const Arguments& arguments, const std::string& name) {
    if (arguments.images.empty()) return std::make_unique<TextToImage>(manifest, request);
    if (name == "kontext") return std::make_unique<Kontext>(manifest, request, arguments);
    if (arguments.mask_images.empty()) {
        return std::make_unique<ImageToImage>(manifest, request, arguments);
    }
    // What is held is noised with the very noise that the picture begins with.
    if (request.latents && name != "fill") {
        throw Error(ErrorCode::usage,
                    "`latents` has no place in inpainting, whose noise comes from `seed`. Leave "
                    "out `latents` or `mask_image`.");
    }
    const auto make = [&](const Arguments& parts,
                          std::optional<MaskCrop> crop) -> std::unique_ptr<Task> {
        if (name == "fill") {
            return std::make_unique<Fill>(manifest, request, parts, std::move(crop));
        }
        return std::make_unique<Inpainting>(manifest, request, parts, std::move(crop));
    };
    if (!arguments.padding_mask_crop) return make(arguments, std::nullopt);
    const std::int64_t padding =
        check_integer("padding_mask_crop", *arguments.padding_mask_crop, 0);
    MaskCrop crop = crop_to_mask(arguments.images, arguments.mask_images, request.height,
                                 request.width, padding);
    Arguments parts = arguments;
    parts.images = {std::move(crop.image)};
    parts.mask_images = {std::move(crop.mask)};
    return make(parts, std::move(crop));
}

}  // namespace

std::unique_ptr<Task> choose_task(const Manifest& manifest, const Request& request,
                                  const Arguments& arguments) {
    const TaskWords& task = asked_task(own_tasks(manifest), given_names(arguments));
    const std::string name = task.task;
    if (!task.chosen_by.empty() && manifest.components.count(kEncoder) == 0) {
        throw Error(ErrorCode::usage, "This bundle has no vae_encoder, which " + name +
                                          " takes. Build it again with one, or leave out " +
                                          quoted(task.chosen_by) + ".");
    }
    if (name == "control") return std::make_unique<Control>(manifest, request, arguments);
    if (name != "controlnet") return plain_task(manifest, request, arguments, name);
    if (arguments.padding_mask_crop && has(task.chosen_by, "mask_image")) {
        throw Error(ErrorCode::usage,
                    "`padding_mask_crop` has no place beside `control_image`, which is of the "
                    "whole picture. Leave it out, or give a part of image, mask and control "
                    "image.");
    }
    return std::make_unique<ControlNet>(manifest, request, arguments,
                                        plain_task(manifest, request, arguments, name));
}

bool draws(const Manifest& manifest, const Arguments& arguments) {
    return !arguments.latents || asked_task(own_tasks(manifest), given_names(arguments)).draws_more;
}

std::vector<std::string> unused_arguments(const Manifest& manifest, const Arguments& arguments) {
    const std::vector<std::string> given = given_names(arguments);
    const std::vector<const TaskWords*> own = own_tasks(manifest);
    const TaskWords& task = asked_task(own, given);
    std::vector<std::string> notices;
    for (const std::string& name : given) {
        if (has(task.chosen_by, name) || has(task.options, name)) continue;
        std::vector<const TaskWords*> takers;
        for (const TaskWords* other : own) {
            if (has(other->options, name)) takers.push_back(other);
        }
        if (takers.empty()) refuse(own, task, name);
        std::vector<std::string> needed;
        for (const TaskWords* other : takers) {
            // Where `image` will do, `image` and `mask_image` need not be said.
            const bool less =
                std::any_of(takers.begin(), takers.end(), [&](const TaskWords* fewer) {
                    return fewer->chosen_by.size() < other->chosen_by.size() &&
                           all_in(fewer->chosen_by, other->chosen_by);
                });
            if (!less) needed.push_back(quoted(other->chosen_by));
        }
        notices.push_back("`" + name + "` does nothing without " + joined(needed, " or ") + ".");
    }
    return notices;
}

}  // namespace fluxdeploy
