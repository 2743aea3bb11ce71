#include "host/request.hpp"

#include <algorithm>
#include <random>

#include "arguments.hpp"
#include "errors.hpp"
#include "host/course.hpp"
#include "sampling/latents.hpp"

namespace fluxdeploy {
namespace {

constexpr double kMaxScale = 1e6;            // of guidance, either way: it is a number around 3
constexpr std::int64_t kMaxPictures = 1000;  // their pixels are in memory until the call ends
// Characters: 512 tokens are some 3,000, and reading a million takes seconds.
constexpr std::int64_t kMaxPrompt = 100000;

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::usage, message); }

// Characters of UTF-8 text: its bytes that begin one.
std::int64_t characters(const std::string& text) {
    return std::count_if(text.begin(), text.end(),
                         [](char c) { return (static_cast<unsigned char>(c) & 0xc0u) != 0x80u; });
}

void check_ids(const std::string& name, const char* encoder, const std::vector<std::int32_t>& ids,
               std::int64_t length) {
    if (static_cast<std::int64_t>(ids.size()) != length) {
        refuse("`" + name + "` has " + std::to_string(ids.size()) + " ids for " + encoder +
               "; it must have " + std::to_string(length) + ", padding included.");
    }
    if (std::any_of(ids.begin(), ids.end(), [](std::int32_t id) { return id < 0; })) {
        refuse("`" + name + "` has an id below 0 for " + encoder + ". Give ids of its tokenizer.");
    }
}

void check_prompts(const std::string& name, const std::vector<Prompt>& prompts,
                   const Manifest& manifest, std::int64_t length) {
    for (const Prompt& prompt : prompts) {
        if (prompt.tokenized) {
            check_ids(name, "CLIP", prompt.clip, manifest.tokenizers.at("clip").max_length);
            check_ids(name, "T5", prompt.t5, length);
        } else if (const std::int64_t size = characters(prompt.text); size > kMaxPrompt) {
            refuse("`" + name + "` has " + std::to_string(size) +
                   " characters; it must have at most " + std::to_string(kMaxPrompt) +
                   ", of which the text encoders read a few hundred words.");
        }
    }
}

// T5 tokens: as the caller says, else as many as the ids that are given, else the default.
std::int64_t sequence_length(const Manifest& manifest, const Arguments& arguments) {
    std::int64_t length = manifest.defaults.max_sequence_length;
    const auto& first = arguments.prompts.front();
    if (first.tokenized) length = static_cast<std::int64_t>(first.t5.size());
    const TokenizerRecord& t5 = manifest.tokenizers.at("t5");
    const auto least =
        std::max<std::int64_t>(1, static_cast<std::int64_t>(t5.prefix.size() + t5.suffix.size()));
    return check_integer("max_sequence_length", arguments.max_sequence_length.value_or(length),
                         least, t5.max_length);
}

// Refuse what no engine of a component takes, before memory is asked for it.
void check_ranges(const Manifest& manifest, const AskedSizes& sizes) {
    for (const auto& [component, symbols] : sizes) {
        const auto record = manifest.components.find(component);
        if (record == manifest.components.end()) continue;
        for (const auto& [symbol, size] : symbols) {
            const DimensionRange* first = nullptr;
            bool taken = false;
            for (const EngineRecord& engine : record->second.engines) {
                const auto allowed = engine.dimensions.find(symbol);
                if (allowed == engine.dimensions.end()) continue;
                if (first == nullptr) first = &allowed->second;
                taken = taken || (allowed->second.min <= size && size <= allowed->second.max);
            }
            if (first != nullptr && !taken) check_range(component, symbol, size, *first);
        }
    }
}

Floats check_latents(const std::vector<float>& latents, const Manifest& manifest,
                     const Request& request) {
    const LatentSpec& spec = manifest.latents;
    const TokenGrid grid = token_grid(request.height, request.width, spec);
    const Shape expected{request.batch(), grid.rows * grid.columns,
                         spec.channels * spec.patch_size * spec.patch_size};
    if (static_cast<std::int64_t>(latents.size()) != count(expected)) {
        refuse("`latents` has " + std::to_string(latents.size()) + " numbers; for " +
               std::to_string(request.batch()) + " pictures of " + std::to_string(request.width) +
               "x" + std::to_string(request.height) + " pixels it must be " + shown(expected) +
               ", packed.");
    }
    if (!all_finite(latents.data(), static_cast<std::int64_t>(latents.size()))) {
        refuse("`latents` holds NaN or infinity. Give finite values.");
    }
    return Floats(expected, latents);
}

}  // namespace

bool Prompt::operator==(const Prompt& other) const {
    return tokenized == other.tokenized && text == other.text && clip == other.clip &&
           t5 == other.t5;
}

AskedSizes Request::engine_sizes(const Manifest& manifest, std::int64_t levels) const {
    const TokenGrid grid = token_grid(height, width, manifest.latents);
    const Shape latents = latent_shape(1, height, width, manifest.latents);
    const std::int64_t tokens = grid.rows * grid.columns;
    const std::int64_t text = max_sequence_length;
    return {
        {"vae_decoder", {{"H", height}, {"W", width}, {"h", latents[2]}, {"w", latents[3]}}},
        {"transformer", {{"L", tokens}, {"S", text}, {"T", text + tokens}}},
        {"conditioner", {{"S", text}, {"N", levels}}},
        {"t5", {{"S", text}}},
        {"clip", {}},
    };
}

Request check_request(const Manifest& manifest, const Arguments& arguments) {
    const Defaults& defaults = manifest.defaults;
    if (arguments.prompts.empty()) {
        refuse("`prompt` must be a string or a list of at least one string, not [].");
    }
    Request request;
    request.max_sequence_length = sequence_length(manifest, arguments);
    request.prompts = arguments.prompts;
    check_prompts("prompt", request.prompts, manifest, request.max_sequence_length);
    std::vector<Prompt> negative = arguments.negative_prompts;
    check_prompts("negative_prompt", negative, manifest, request.max_sequence_length);
    if (negative.size() == 1) negative.resize(request.prompts.size(), negative.front());
    if (!negative.empty() && negative.size() != request.prompts.size()) {
        refuse("There are " + std::to_string(negative.size()) + " negative prompts for " +
               std::to_string(request.prompts.size()) +
               " prompts. Give one for all, or one for each.");
    }
    request.true_cfg_scale =
        check_number("true_cfg_scale", arguments.true_cfg_scale, -kMaxScale, kMaxScale);
    if (request.true_cfg_scale > 1) request.negative_prompts = std::move(negative);
    request.sampler = find_sampler(arguments.sampler).name;
    request.height = arguments.height.value_or(defaults.height);
    request.width = arguments.width.value_or(defaults.width);
    check_size(request.height, request.width, manifest.latents);
    request.num_images_per_prompt =
        check_integer("num_images_per_prompt", arguments.num_images_per_prompt, 1);
    request.num_inference_steps =
        check_integer("num_inference_steps",
                      arguments.num_inference_steps.value_or(defaults.num_inference_steps), 1);
    request.guidance_scale =
        check_number("guidance_scale", arguments.guidance_scale.value_or(defaults.guidance_scale),
                     -kMaxScale, kMaxScale);
    request.skip = check_skip(manifest, arguments, request.num_inference_steps);
    // Told without multiplying, which may not be possible.
    const auto prompts = static_cast<std::int64_t>(request.prompts.size());
    if (prompts > kMaxPictures || request.num_images_per_prompt > kMaxPictures / prompts) {
        const bool countable = request.num_images_per_prompt < INT64_MAX / prompts;
        refuse((countable ? std::to_string(request.batch()) : "So many") +
               " pictures are too many for one call, which makes at most " +
               std::to_string(kMaxPictures) + ". Make several calls.");
    }
    check_ranges(manifest, request.engine_sizes(manifest, request.num_inference_steps));
    if (arguments.latents) {
        request.latents = check_latents(*arguments.latents, manifest, request);
    } else {
        request.seed = arguments.seed ? *arguments.seed : std::random_device()();
    }
    return request;
}

std::vector<std::string> idle_arguments(const Manifest& manifest, const Arguments& arguments) {
    std::vector<std::string> notices;
    if (!arguments.negative_prompts.empty() && arguments.true_cfg_scale <= 1) {
        notices.push_back("`negative_prompt` does nothing unless `true_cfg_scale` is above 1.");
    }
    if (arguments.negative_prompts.empty() && arguments.true_cfg_scale != 1) {
        notices.push_back("`true_cfg_scale` does nothing without `negative_prompt`.");
    }
    if (arguments.guidance_scale && !manifest.guidance_embedding) {
        notices.push_back(
            "`guidance_scale` does nothing here: this bundle's model has no guidance embedding.");
    }
    if (arguments.seed && arguments.latents) {
        notices.push_back("`seed` does nothing beside `latents`.");
    }
    return notices;
}

}  // namespace fluxdeploy
