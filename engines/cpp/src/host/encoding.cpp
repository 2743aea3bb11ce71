#include "host/encoding.hpp"

#include <algorithm>

#include "arguments.hpp"
#include "errors.hpp"
#include "host/input_images.hpp"
#include "sampling/latents.hpp"

namespace fluxdeploy {

std::pair<Floats, Floats> encode(const Floats& images, const LatentSpec& spec, const Run& run) {
    const Shape wanted = latent_shape(1, images.shape[2], images.shape[3], spec);
    Floats mean({0, wanted[1], wanted[2], wanted[3]}, {});
    Floats logvar = mean;
    const Shape one{1, images.shape[1], images.shape[2], images.shape[3]};
    for (std::int64_t image = 0; image < images.shape[0]; ++image) {
        const Outputs encoded =
            run(kEncoder, {{"images", View(one, images.data() + image * count(one))}});
        for (auto& [values, name] : {std::pair(&mean, "mean"), std::pair(&logvar, "logvar")}) {
            const Floats& each = encoded.at(name);
            if (each.shape != wanted) {
                throw Error(ErrorCode::engine,
                            "The vae_encoder gave " + shown(each.shape) + " where latents are " +
                                shown(wanted) +
                                ". Build the bundle again with `fluxdeploy build`.");
            }
            values->values.insert(values->values.end(), each.values.begin(), each.values.end());
        }
    }
    mean.shape[0] = logvar.shape[0] = images.shape[0];
    return {std::move(mean), std::move(logvar)};
}

Floats known_latents(const Floats& images, const Floats& epsilon, const LatentSpec& spec,
                     const Run& run) {
    auto [mean, logvar] = encode(images, spec, run);
    sample_posterior(mean, logvar, epsilon);
    scale(mean, spec);
    return std::move(mean);
}

AskedSizes encoder_sizes(std::int64_t height, std::int64_t width, const LatentSpec& spec) {
    const Shape latents = latent_shape(1, height, width, spec);
    return {{kEncoder, {{"H", height}, {"W", width}, {"h", latents[2]}, {"w", latents[3]}}}};
}

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

Floats repeat_each(const Floats& values, std::int64_t batch) {
    const std::int64_t width = values.size() / values.shape[0];
    const std::int64_t times = batch / values.shape[0];
    Shape shape = values.shape;
    shape[0] = batch;
    Floats all(std::move(shape));
    for (std::int64_t picture = 0; picture < batch; ++picture) {
        const float* from = values.data() + picture / times * width;
        std::copy(from, from + width, all.data() + picture * width);
    }
    return all;
}

Floats read_controls(const std::vector<Picture>& images, const Request& request) {
    const std::int64_t prompts = request.text.size();
    const auto count = static_cast<std::int64_t>(images.size());
    if (count != 1 && count != prompts && count != request.batch()) {
        throw Error(ErrorCode::usage, "There are " + std::to_string(count) +
                                          " control images for " + std::to_string(prompts) +
                                          " prompts and " + std::to_string(request.batch()) +
                                          " pictures. Give one for all, one a prompt or one a "
                                          "picture.");
    }
    return to_pixels(images, request.height, request.width);
}

Floats start_noise(const Request& request, const LatentSpec& spec, Generators& generators) {
    if (request.latents) return *request.latents;
    const Shape shape = latent_shape(request.batch(), request.height, request.width, spec);
    return pack(generators.normal(shape), spec);
}

Floats control_latents(const Floats& images, std::int64_t batch, const LatentSpec& spec,
                       Generators& generators, const Run& run) {
    const Floats epsilon =
        generators.normal(latent_shape(batch, images.shape[2], images.shape[3], spec));
    const auto [mean, logvar] = encode(images, spec, run);
    Floats known = repeat_each(mean, batch);
    sample_posterior(known, repeat_each(logvar, batch), epsilon);
    scale(known, spec);
    return pack(known, spec);
}

}  // namespace fluxdeploy
