#include "host/tasks.hpp"

#include "arguments.hpp"
#include "errors.hpp"
#include "host/input_images.hpp"
#include "sampling/latents.hpp"
#include "sampling/noise.hpp"
#include "sampling/schedule.hpp"

namespace fluxdeploy {
namespace {

constexpr const char* kEncoder = "vae_encoder";
constexpr const char* kNoCrop =
    "`padding_mask_crop` does nothing without `image` and `mask_image`.";

// The latents of pictures, at the transformer's scale: [Bi, C, h, w], given `epsilon` of that
// shape. One picture at a time.
Floats encode(const Floats& images, const Floats& epsilon, const LatentSpec& spec, const Run& run) {
    Floats mean({0, epsilon.shape[1], epsilon.shape[2], epsilon.shape[3]}, {});
    Floats logvar = mean;
    const Shape one{1, images.shape[1], images.shape[2], images.shape[3]};
    for (std::int64_t image = 0; image < images.shape[0]; ++image) {
        const Outputs encoded =
            run(kEncoder, {{"images", View(one, images.data() + image * count(one))}});
        for (auto& [values, name] : {std::pair(&mean, "mean"), std::pair(&logvar, "logvar")}) {
            const Floats& each = encoded.at(name);
            Shape wanted = epsilon.shape;
            wanted[0] = 1;
            if (each.shape != wanted) {
                throw Error(ErrorCode::engine,
                            "The vae_encoder gave " + shown(each.shape) + " where latents are " +
                                shown(wanted) +
                                ". Build the bundle again with `fluxdeploy build`.");
            }
            values->values.insert(values->values.end(), each.values.begin(), each.values.end());
        }
    }
    mean.shape[0] = images.shape[0];
    sample_posterior(mean, logvar, epsilon);
    scale(mean, spec);
    return mean;
}

// `values` again and again, for `batch` pictures.
Floats repeat(const Floats& values, std::int64_t batch) {
    Shape shape = values.shape;
    const std::int64_t times = batch / shape[0];
    shape[0] = batch;
    Floats repeated(std::move(shape), {});
    for (std::int64_t time = 0; time < times; ++time) {
        repeated.values.insert(repeated.values.end(), values.values.begin(), values.values.end());
    }
    return repeated;
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

    Start prepare(const std::vector<float>& sigmas, const Run&) const override {
        if (request_.latents) return {*request_.latents, sigmas, {}};
        const LatentSpec& spec = manifest_.latents;
        const Floats noise =
            Generators(request_.seeds)
                .normal(latent_shape(request_.batch(), request_.height, request_.width, spec));
        return {pack(noise, spec), sigmas, {}};
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
        const Shape latents = latents_of(1);
        return {{kEncoder,
                 {{"H", request_.height},
                  {"W", request_.width},
                  {"h", latents[2]},
                  {"w", latents[3]}}}};
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

    Start prepare(const std::vector<float>& sigmas, const Run& run) const override {
        if (request_.latents) return {*request_.latents, last_levels(sigmas, steps()), {}};
        return start(noised(sigmas, run));
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
    Noised noised(const std::vector<float>& sigmas, const Run& run) const {
        Generators generators(request_.seeds);
        const Floats epsilon = generators.normal(latents_of(images_.shape[0]));
        const Floats known = encode(images_, epsilon, manifest_.latents, run);
        return {last_levels(sigmas, steps()), repeat(known, request_.batch()),
                generators.normal(latents_of(request_.batch()))};
    }

    Start start(const Noised& noised) const {
        const Floats mixed = scale_noise(noised.known, noised.noise, noised.sigmas.front());
        return {pack(mixed, manifest_.latents), noised.sigmas, {}};
    }

    Shape latents_of(std::int64_t batch) const {
        return latent_shape(batch, request_.height, request_.width, manifest_.latents);
    }

    const Manifest& manifest_;
    const Request& request_;

private:
    double strength_ = 0;
    Floats images_;
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
          crop_(std::move(crop)),
          masks_(static_cast<std::int64_t>(arguments.mask_images.size())),
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

    Start prepare(const std::vector<float>& sigmas, const Run& run) const override {
        const LatentSpec& spec = manifest_.latents;
        const Noised own = noised(sigmas, run);
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

private:
    // What the first pixel of a latent says.
    bool marked(std::int64_t mask, std::int64_t row, std::int64_t column) const {
        const std::int64_t side = manifest_.latents.spatial_factor;
        const std::int64_t line = mask * request_.height + row * side;
        return marked_[static_cast<std::size_t>(line * request_.width + column * side)];
    }

    std::optional<MaskCrop> crop_;
    std::int64_t masks_;
    std::vector<bool> marked_;
};

void require_encoder(const Manifest& manifest, const std::string& task, const std::string& names) {
    if (manifest.components.count(kEncoder) != 0) return;
    throw Error(ErrorCode::usage, "This bundle has no vae_encoder, which " + task +
                                      " takes. Build it again with one, or leave out " + names +
                                      ".");
}

}  // namespace

std::unique_ptr<Task> choose_task(const Manifest& manifest, const Request& request,
                                  const Arguments& arguments) {
    if (arguments.images.empty()) return std::make_unique<TextToImage>(manifest, request);
    if (arguments.mask_images.empty()) {
        require_encoder(manifest, "image to image", "`image`");
        return std::make_unique<ImageToImage>(manifest, request, arguments);
    }
    require_encoder(manifest, "inpainting", "`image` and `mask_image`");
    if (request.latents) {
        throw Error(ErrorCode::usage,
                    "`latents` has no place in inpainting, whose noise comes from `seed`. Leave "
                    "out `latents` or `mask_image`.");
    }
    if (!arguments.padding_mask_crop) {
        return std::make_unique<Inpainting>(manifest, request, arguments, std::nullopt);
    }
    const std::int64_t padding =
        check_integer("padding_mask_crop", *arguments.padding_mask_crop, 0);
    MaskCrop crop = crop_to_mask(arguments.images, arguments.mask_images, request.height,
                                 request.width, padding);
    Arguments parts = arguments;
    parts.images = {std::move(crop.image)};
    parts.mask_images = {std::move(crop.mask)};
    return std::make_unique<Inpainting>(manifest, request, parts, std::move(crop));
}

std::vector<std::string> unused_arguments(const Arguments& arguments) {
    const bool no_crop = arguments.padding_mask_crop && arguments.mask_images.empty();
    std::vector<std::string> notices;
    if (!arguments.images.empty()) {
        if (no_crop) notices.push_back(kNoCrop);
        return notices;
    }
    if (!arguments.mask_images.empty()) {
        throw Error(ErrorCode::usage,
                    "`mask_image` has no place in text to image: inpainting takes `image` and "
                    "`mask_image`. Give what one task takes.");
    }
    if (arguments.strength) notices.push_back("`strength` does nothing without `image`.");
    if (no_crop) notices.push_back(kNoCrop);
    return notices;
}

}  // namespace fluxdeploy
