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

Floats draw(TorchGenerator& generator, Shape shape) {
    Floats values(std::move(shape));
    generator.normal(values.data(), values.size());
    return values;
}

// The latents of pictures, at the transformer's scale: [Bi, C, h, w], given `epsilon` of that
// shape. One picture at a time.
Floats encode(const Floats& images, const Floats& epsilon, const LatentSpec& spec,
              const Run& run) {
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
        TorchGenerator generator(request_.seed.value());
        const Floats noise = draw(
            generator,
            latent_shape(request_.batch(), request_.height, request_.width, spec));
        return {pack(noise, spec), sigmas, {}};
    }

private:
    const Manifest& manifest_;
    const Request& request_;
};

// From a noised picture through the rest of the schedule, as diffusers' FluxImg2ImgPipeline, after
// SDEdit (arXiv 2108.01073). Picture k of the B begins with image k modulo their number.
class ImageToImage : public Task {
public:
    ImageToImage(const Manifest& manifest, const Request& request, const Arguments& arguments)
        : manifest_(manifest), request_(request) {
        if (manifest.components.count(kEncoder) == 0) {
            throw Error(ErrorCode::usage,
                        "This bundle has no vae_encoder, which image to image takes. Build it "
                        "again with one, or leave out `image`.");
        }
        strength_ = check_number("strength",
                                 arguments.strength.value_or(manifest.defaults.strength), 0, 1);
        const auto given = static_cast<std::int64_t>(arguments.images.size());
        if (request.batch() % given != 0) {
            throw Error(ErrorCode::usage, "There are " + std::to_string(given) + " images for " +
                                              std::to_string(request.batch()) +
                                              " pictures. Give one for all, or as many as divide "
                                              "that number.");
        }
        if (steps() < 1) {
            throw Error(ErrorCode::usage, "At strength " + general(strength_) + " none of " +
                                              std::to_string(request.num_inference_steps) +
                                              " steps is left. Raise `strength` or "
                                              "`num_inference_steps`.");
        }
        images_ = to_pixels(arguments.images, request.height, request.width);
    }

    // The steps after the one that the noised picture stands for.
    std::int64_t steps() const override {
        return request_.num_inference_steps - first_step(request_.num_inference_steps, strength_);
    }

    AskedSizes engine_sizes() const override {
        const Shape latents =
            latent_shape(1, request_.height, request_.width, manifest_.latents);
        return {{kEncoder,
                 {{"H", request_.height},
                  {"W", request_.width},
                  {"h", latents[2]},
                  {"w", latents[3]}}}};
    }

    std::vector<std::string> notices() const override {
        if (request_.latents) {
            return {
                "`image` does nothing beside `latents`, which are taken for the noised image."};
        }
        if (steps() == request_.num_inference_steps) {
            return {"`image` does nothing: at strength " + general(strength_) + " all of the " +
                    std::to_string(steps()) +
                    " steps are made, from noise alone. Lower `strength`, or raise "
                    "`num_inference_steps`."};
        }
        return {};
    }

    // One generator draws the noise of the encoder's posterior first, and then the noise that the
    // picture is mixed with.
    Start prepare(const std::vector<float>& sigmas, const Run& run) const override {
        const std::vector<float> left = last_levels(sigmas, steps());
        if (request_.latents) return {*request_.latents, left, {}};
        const LatentSpec& spec = manifest_.latents;
        const auto shape = [&](std::int64_t batch) {
            return latent_shape(batch, request_.height, request_.width, spec);
        };
        TorchGenerator generator(request_.seed.value());
        const Floats epsilon = draw(generator, shape(images_.shape[0]));
        const Floats known = encode(images_, epsilon, spec, run);
        const Floats noise = draw(generator, shape(request_.batch()));
        const Floats noised =
            scale_noise(repeat(known, request_.batch()), noise, left.front());
        return {pack(noised, spec), left, {}};
    }

private:
    const Manifest& manifest_;
    const Request& request_;
    double strength_ = 0;
    Floats images_;
};

}  // namespace

std::unique_ptr<Task> choose_task(const Manifest& manifest, const Request& request,
                                  const Arguments& arguments) {
    if (arguments.images.empty()) return std::make_unique<TextToImage>(manifest, request);
    return std::make_unique<ImageToImage>(manifest, request, arguments);
}

std::vector<std::string> unused_arguments(const Arguments& arguments) {
    if (arguments.images.empty() && arguments.strength) {
        return {"`strength` does nothing without `image`."};
    }
    return {};
}

}  // namespace fluxdeploy
