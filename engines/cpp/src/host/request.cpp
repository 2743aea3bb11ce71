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
[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::usage, message); }

// T5 tokens: as the caller says, else as many as the ids that are given, else the default.
std::int64_t sequence_length(const Manifest& manifest, const Arguments& arguments) {
    std::int64_t length = manifest.defaults.max_sequence_length;
    const std::vector<Prompt>& prompts = arguments.words.prompts;
    if (!prompts.empty() && prompts.front().tokenized) {
        length = static_cast<std::int64_t>(prompts.front().t5.size());
    }
    const TokenizerRecord& t5 = manifest.tokenizers.at("t5");
    const auto least =
        std::max<std::int64_t>(1, static_cast<std::int64_t>(t5.prefix.size() + t5.suffix.size()));
    return check_integer("max_sequence_length", arguments.max_sequence_length.value_or(length),
                         least, t5.max_length);
}

// S, of which positive and negative text must have as many: they share their positions.
std::int64_t text_tokens(const Text& text, const std::optional<Text>& negative,
                         std::int64_t length) {
    const std::int64_t own = text.tokens(length);
    const std::int64_t other = negative ? negative->tokens(length) : own;
    if (own == other) return own;
    refuse("The text has " + std::to_string(own) + " tokens, and the negative text " +
           std::to_string(other) + ". Give as many of both." +
           (text.embeddings && negative->embeddings
                ? ""
                : " A prompt has `max_sequence_length` of them."));
}

// One seed for all pictures, or one for each; none where the caller gives none.
std::vector<std::uint64_t> check_seeds(const Arguments& arguments, std::int64_t prompts) {
    if (arguments.seed && !arguments.seeds.empty()) {
        refuse("`seed` and `seeds` are both given. Give one of them.");
    }
    if (arguments.seed) return {*arguments.seed};
    const auto count = static_cast<std::int64_t>(arguments.seeds.size());
    // Told without multiplying, which may not be possible.
    const std::int64_t each = arguments.num_images_per_prompt;
    if (count > 0 && (count % each != 0 || count / each != prompts)) {
        const bool countable = each <= INT64_MAX / prompts;
        refuse("There are " + std::to_string(count) + " seeds for " +
               (countable ? std::to_string(prompts * each) : "so many") +
               " pictures. Give a list with one for each, or one integer for all.");
    }
    return arguments.seeds;
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

AskedSizes Request::engine_sizes(const Manifest& manifest, std::int64_t levels) const {
    const TokenGrid grid = token_grid(height, width, manifest.latents);
    const Shape latents = latent_shape(1, height, width, manifest.latents);
    const std::int64_t tokens = grid.rows * grid.columns;
    const std::int64_t length = max_sequence_length;
    AskedSizes sizes{
        {"vae_decoder", {{"H", height}, {"W", width}, {"h", latents[2]}, {"w", latents[3]}}},
        {"transformer", {{"L", tokens}, {"S", length}, {"T", length + tokens}}},
        {"conditioner", {{"S", length}, {"N", levels}}},
    };
    if (!text.embeddings || (negative && !negative->embeddings)) {
        sizes.push_back({"t5", {{"S", length}}});
        sizes.push_back({"clip", {}});
    }
    return sizes;
}

Request check_request(const Manifest& manifest, const Arguments& arguments, const AskedSize& size,
                      bool drawing) {
    const Defaults& defaults = manifest.defaults;
    Request request;
    request.text = read_text(manifest, arguments.words);
    const std::int64_t prompts = request.text.size();
    request.negative = read_negative_text(manifest, arguments.negative_words, prompts);
    request.true_cfg_scale =
        check_number("true_cfg_scale", arguments.true_cfg_scale, -kMaxScale, kMaxScale);
    if (request.true_cfg_scale <= 1) request.negative.reset();
    request.sampler = find_sampler(arguments.sampler).name;
    request.sigmas = check_sigmas(arguments);
    request.height = size.height.value_or(defaults.height);
    request.width = size.width.value_or(defaults.width);
    check_size(request.height, request.width, manifest.latents);
    request.num_images_per_prompt =
        check_integer("num_images_per_prompt", arguments.num_images_per_prompt, 1);
    request.seeds = check_seeds(arguments, prompts);
    const std::int64_t length = sequence_length(manifest, arguments);
    check_ids(manifest, request.text, "prompt", length);
    if (request.negative) check_ids(manifest, *request.negative, "negative_prompt", length);
    request.num_inference_steps =
        request.sigmas.empty()
            ? check_integer("num_inference_steps",
                            arguments.num_inference_steps.value_or(defaults.num_inference_steps), 1)
            : static_cast<std::int64_t>(request.sigmas.size());
    request.guidance_scale =
        check_number("guidance_scale", arguments.guidance_scale.value_or(defaults.guidance_scale),
                     -kMaxScale, kMaxScale);
    request.max_sequence_length = text_tokens(request.text, request.negative, length);
    request.skip = check_skip(manifest, arguments, request.num_inference_steps);
    // Told without multiplying, which may not be possible.
    if (prompts > kMaxPictures || request.num_images_per_prompt > kMaxPictures / prompts) {
        const bool countable = request.num_images_per_prompt < INT64_MAX / prompts;
        refuse((countable ? std::to_string(request.batch()) : "So many") +
               " pictures are too many for one call, which makes at most " +
               std::to_string(kMaxPictures) + ". Make several calls.");
    }
    check_ranges(manifest, request.engine_sizes(manifest, request.num_inference_steps));
    if (arguments.latents) {
        request.latents = check_latents(*arguments.latents, manifest, request);
    }
    if (!drawing) {
        request.seeds.clear();
    } else if (request.seeds.empty()) {
        request.seeds = {std::random_device()()};
    }
    return request;
}

std::vector<std::string> idle_arguments(const Manifest& manifest, const Arguments& arguments,
                                        bool drawing) {
    std::vector<std::string> notices;
    const Words& words = arguments.words;
    const Words& away = arguments.negative_words;
    const bool negative = !away.prompts.empty() || away.prompt_embeds;
    const bool unused = arguments.true_cfg_scale <= 1;
    for (const auto& [name, given] :
         {std::pair("negative_prompt", !away.prompts.empty()),
          std::pair("negative_prompt_embeds", away.prompt_embeds.has_value())}) {
        if (!given || !unused) continue;
        notices.push_back(std::string("`") + name +
                          "` does nothing unless `true_cfg_scale` is above 1.");
    }
    if (!negative && arguments.true_cfg_scale != 1) {
        notices.push_back("`true_cfg_scale` does nothing without `negative_prompt`.");
    }
    if (!negative && !away.prompts_2.empty()) {
        notices.push_back("`negative_prompt_2` does nothing without `negative_prompt`.");
    }
    if (arguments.max_sequence_length && words.prompts.empty() &&
        (unused || away.prompts.empty())) {
        notices.push_back("`max_sequence_length` does nothing beside `prompt_embeds`.");
    }
    if (arguments.guidance_scale && !manifest.guidance_embedding) {
        notices.push_back(
            "`guidance_scale` does nothing here: this bundle's model has no guidance embedding.");
    }
    if ((arguments.seed || !arguments.seeds.empty()) && !drawing) {
        notices.push_back("`seed` does nothing beside `latents`.");
    }
    return notices;
}

}  // namespace fluxdeploy
