#include "host/pipeline.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <future>
#include <thread>

#include "arguments.hpp"
#include "errors.hpp"
#include "host/course.hpp"
#include "host/loop.hpp"
#include "host/previews.hpp"
#include "host/tasks.hpp"
#include "host/tiles.hpp"
#include "host/velocity.hpp"
#include "machine.hpp"
#include "sampling/latents.hpp"
#include "sampling/schedule.hpp"

namespace fluxdeploy {
namespace {

constexpr std::int64_t kMaxDevice = 2147483647;

EngineOptions checked(EngineOptions options) {
    if (options.threads) {
        // Runtimes start as many as they are told to, and thousands take a machine's memory.
        const auto usable = static_cast<std::int64_t>(std::thread::hardware_concurrency());
        check_integer("threads", *options.threads, 1, std::max<std::int64_t>(usable, 1),
                      "(the logical CPUs that this process may use)");
    }
    check_integer("device", options.device, 0, kMaxDevice);
    for (const auto& [runtime, path] : options.libraries) check_runtime(runtime);
    return options;
}

void require_components(const Bundle& bundle) {
    const auto missing = missing_component(bundle.manifest);
    if (!missing) return;
    throw Error(ErrorCode::bundle, "The bundle " + bundle.root.string() + " has no " + *missing +
                                       ", which every picture takes. Build the bundle again with "
                                       "`fluxdeploy build`.");
}

std::shared_ptr<const Tokenizers> read_tokenizers(const Bundle& bundle) {
    auto t5 = std::async([&] { return Tokenizer::read(bundle, "t5"); });
    Tokenizer clip = Tokenizer::read(bundle, "clip");
    return std::make_shared<const Tokenizers>(Tokenizers{std::move(clip), t5.get()});
}

OpenedBundle open(const std::string& path, const std::string& runtime, EngineOptions options) {
    check_runtime(runtime);
    auto runtimes = std::make_unique<Runtimes>(runtime, checked(std::move(options)));
    std::shared_ptr<const Tokenizers> tokenizers;
    Bundle opened = open_bundle(path, [&](const Bundle& bundle) {
        require_components(bundle);
        const auto loading =
            std::async(std::launch::async, [&] { runtimes->load_for(bundle.manifest); });
        tokenizers = read_tokenizers(bundle);
    });
    opened.manifest = runtimes->choose(opened.manifest);
    require_components(opened);
    return {std::make_shared<EnginePool>(std::move(opened), std::move(runtimes)), tokenizers};
}

// Lets go of what a call that failed has left open.
class ReleaseAll {
public:
    explicit ReleaseAll(Components& components) : components_(components) {}
    ~ReleaseAll() { components_.release_all(); }
    ReleaseAll(const ReleaseAll&) = delete;
    ReleaseAll& operator=(const ReleaseAll&) = delete;

private:
    Components& components_;
};

// Put what was drawn around a mask into the whole picture.
void lay_over(const MaskCrop& crop, Result& result) {
    std::vector<std::uint8_t> whole;
    const std::int64_t size = result.width * result.height * 3;
    for (std::int64_t index = 0; index < result.count; ++index) {
        const auto from = result.pixels.begin() + index * size;
        const Picture laid = crop.overlay({result.width, result.height, {from, from + size}, {}});
        whole.insert(whole.end(), laid.rgb.begin(), laid.rgb.end());
    }
    result.pixels = std::move(whole);
    result.width = crop.original.width;
    result.height = crop.original.height;
}

// Ask a component for these sizes, in place of what it was asked for by the same symbols.
void add_sizes(AskedSizes& sizes, const std::string& component,
               const std::map<std::string, std::int64_t>& symbols) {
    for (auto& [name, asked] : sizes) {
        if (name != component) continue;
        for (const auto& [symbol, size] : symbols) asked[symbol] = size;
        return;
    }
    sizes.push_back({component, symbols});
}

// The ControlNets that count in some step, each with what the prompts make of it.
std::vector<RunningControlNet> running(std::vector<ControlInput>& controls,
                                       std::vector<Condition> conditions, Components& components) {
    std::vector<RunningControlNet> found;
    for (ControlInput& control : controls) {
        if (!control.counts()) continue;
        found.push_back({components.engine(control.record.component),
                         std::move(conditions[found.size()]), std::move(control.latents),
                         std::move(control.scales)});
    }
    return found;
}

std::string short_number(double value, const char* format) {
    char digits[64];
    std::snprintf(digits, sizeof digits, format, value);
    return digits;
}

// What the prompts make of each ControlNet that counts in some step.
std::vector<Condition> control_conditions(const Start& start, const EncodedPrompts& prompts,
                                          const std::vector<float>& levels, const Request& request,
                                          const Manifest& manifest, const Run& run) {
    std::vector<Condition> conditions;
    for (const ControlInput& control : start.controls) {
        if (!control.counts()) continue;
        const std::string name = control.record.conditioner();
        std::optional<double> guidance;
        for (const TensorSpec& spec : manifest.components.at(name).inputs) {
            if (spec.name == "guidance") guidance = request.guidance_scale;
        }
        conditions.push_back(condition(prompts, levels, guidance, run, name, control.mode));
    }
    return conditions;
}

// What comes after each step: previews where they are asked for, and the caller's callback.
AfterStep callback_of(const Arguments& arguments, const Request& request, const Manifest& manifest,
                      const Start& start, std::optional<LinearPreviews>& previews) {
    if (!arguments.on_step_end) return {};
    if (arguments.preview) {
        previews.emplace(manifest, request.height, request.width, start.sigmas);
        previews->before_step(start.latents);
    }
    return [&](std::int64_t step, std::int64_t steps, float sigma, Floats& latents) {
        const PreviewPictures* shown = previews ? &previews->after_step(step, latents) : nullptr;
        const bool go_on = arguments.on_step_end(step, steps, sigma, latents, shown);
        if (previews) previews->before_step(latents);
        return go_on;
    };
}

void append(std::vector<std::string>& list, const std::vector<std::string>& more) {
    list.insert(list.end(), more.begin(), more.end());
}

}  // namespace

FluxPipeline::FluxPipeline(const std::string& path, const std::string& runtime,
                           EngineOptions options, bool low_vram)
    : FluxPipeline(open(path, runtime, std::move(options)), low_vram) {}

FluxPipeline::FluxPipeline(OpenedBundle opened, bool low_vram)
    : pool_(std::move(opened.pool)),
      tokenizers_(std::move(opened.tokenizers)),
      components_(pool_, low_vram),
      encoder_(tokenizers_) {}

std::unique_ptr<FluxPipeline> FluxPipeline::clone() const {
    return std::unique_ptr<FluxPipeline>(
        new FluxPipeline(OpenedBundle{pool_, tokenizers_}, components_.low_vram()));
}

void FluxPipeline::load() {
    const CancelToken token;
    const Turns::Taken turn(turns_, token);
    components_.check_sizes(
        token,
        {{"vae_decoder", {}}, {"transformer", {}}, {"conditioner", {}}, {"t5", {}}, {"clip", {}}});
}

Result FluxPipeline::generate(const Arguments& arguments) {
    const Manifest& manifest = bundle().manifest;
    std::vector<std::string> notices = unused_arguments(manifest, arguments);
    const bool drawing = draws(manifest, arguments);
    const Request request =
        check_request(manifest, arguments, asked_size(manifest, arguments), drawing);
    const std::unique_ptr<Task> task = choose_task(manifest, request, arguments);
    if (arguments.preview) require_linear(manifest);
    append(notices, idle_arguments(manifest, arguments, drawing));
    append(notices, task->notices());
    const std::int64_t length = request.max_sequence_length;
    append(notices, encoder_.cuts(request.text, length, "The prompt"));
    if (request.negative) {
        append(notices, encoder_.cuts(*request.negative, length, "The negative prompt"));
    }
    if (arguments.skip_recorded) append(notices, unmeasured(manifest, request));
    const Turns::Taken turn(turns_, arguments.cancel);
    const ReleaseAll on_exit(components_);
    Result result = make(request, *task, arguments);
    append(notices, result.notices);
    result.notices = std::move(notices);
    return result;
}

Result FluxPipeline::make(const Request& request, const Task& task, const Arguments& arguments) {
    const Manifest& manifest = bundle().manifest;
    const CancelToken& cancel = arguments.cancel;
    std::vector<std::string> tiles;
    const Run run =
        tiled([&](const std::string& component,
                  const Inputs& inputs) { return components_.run(cancel, component, inputs); },
              manifest, [&](const std::string& sentence) { tiles.push_back(sentence); },
              available_memory);
    const TokenGrid grid = token_grid(request.height, request.width, manifest.latents);
    const std::vector<float> schedule =
        sigmas(manifest.schedule,
               request.sigmas.empty() ? even_levels(request.num_inference_steps) : request.sigmas,
               grid.rows * grid.columns);
    const Sampler& sampler = find_sampler(request.sampler);
    const std::int64_t first = request.num_inference_steps - task.steps();
    const std::vector<float> ahead(schedule.begin() + first, schedule.end());
    const auto evaluated = static_cast<std::int64_t>(sampler.levels(ahead).size());
    AskedSizes sizes = request.engine_sizes(manifest, evaluated);
    for (const auto& [component, symbols] : task.engine_sizes()) {
        add_sizes(sizes, component, symbols);
    }
    components_.check_sizes(cancel, sizes);

    Generators generators(request.seeds);
    Start start = task.prepare(schedule, generators, run);
    components_.release("vae_encoder");
    for (const ControlNetRecord& record : manifest.controlnets) {
        components_.release(record.encoder());
    }
    Conditions conditions = condition_all(request, start, sampler.levels(start.sigmas), run);

    // Before the largest component is opened.
    cancel.check("before the first step");
    draw(start, std::move(conditions), request, arguments, first);
    Result result;
    result.count = request.batch();
    result.height = request.height;
    result.width = request.width;
    if (request.seeds.size() == 1) result.seed = request.seeds.front();
    result.steps = task.steps();
    decode(start.latents, request, run, cancel, result.pixels);
    result.notices = std::move(tiles);
    if (const MaskCrop* crop = task.crop()) lay_over(*crop, result);
    return result;
}

FluxPipeline::Conditions FluxPipeline::condition_all(const Request& request, const Start& start,
                                                     const std::vector<float>& levels,
                                                     const Run& run) {
    const Manifest& manifest = bundle().manifest;
    std::optional<double> guidance;
    if (manifest.guidance_embedding) guidance = request.guidance_scale;
    const auto encoded = [&](const Text& text) {
        return encoder_.encode(text, request.num_images_per_prompt, request.max_sequence_length,
                               run);
    };
    const EncodedPrompts prompts = encoded(request.text);
    EncodedPrompts opposites;
    if (request.negative) opposites = encoded(*request.negative);
    Conditions made;
    made.towards = condition(prompts, levels, guidance, run);
    if (request.negative) made.away = condition(opposites, levels, guidance, run);
    made.controls = control_conditions(start, prompts, levels, request, manifest, run);
    for (const char* done : {"clip", "t5", "conditioner"}) components_.release(done);
    for (const ControlNetRecord& record : manifest.controlnets) {
        components_.release(record.conditioner());
    }
    return made;
}

void FluxPipeline::draw(Start& start, Conditions conditions, const Request& request,
                        const Arguments& arguments, std::int64_t first) {
    const Manifest& manifest = bundle().manifest;
    const CancelToken& cancel = arguments.cancel;
    const std::optional<Condition>& away = conditions.away;
    std::vector<TokenGrid> pictures{token_grid(request.height, request.width, manifest.latents)};
    pictures.insert(pictures.end(), start.references.begin(), start.references.end());
    const RopeTables positions =
        rope_tables(manifest.rope, conditions.towards.context.shape[1], pictures);
    Engine& transformer = components_.engine("transformer");
    HiddenStates hidden(std::move(start.channels), std::move(start.tokens));
    ControlResiduals residuals(
        transformer, running(start.controls, std::move(conditions.controls), components_),
        positions, away.has_value(), [&] { cancel.check("in the middle of a step"); });
    ModulatedTransformer::Added computed, recalled;
    if (residuals.any()) {
        // The prompts' evaluation comes first, and the negative prompts' takes over what it had.
        computed = [&](std::int64_t level, const Floats& latents,
                       BatchPart part) -> const Residuals& {
            return residuals.compute(level, latents, part);
        };
        recalled = [&](std::int64_t, const Floats&, BatchPart part) -> const Residuals& {
            return residuals.recall(part);
        };
    }
    ModulatedTransformer velocity(transformer, conditions.towards, positions, hidden, cancel,
                                  computed);
    std::optional<ModulatedTransformer> negative;
    if (away) negative.emplace(transformer, *away, positions, hidden, cancel, recalled);
    const Blend step_made = [&](std::int64_t step, Floats& latents) {
        residuals.set_step(step + 1);
        if (start.blend) start.blend(step, latents);
    };
    std::optional<LinearPreviews> previews;
    denoise(find_sampler(request.sampler), start.latents, start.sigmas, std::ref(velocity),
            negative ? Velocity(std::ref(*negative)) : Velocity(), request.true_cfg_scale,
            request.skip.after(first), step_made,
            callback_of(arguments, request, manifest, start, previews), cancel);
    components_.release("transformer");
    for (const ControlNetRecord& record : manifest.controlnets) {
        components_.release(record.component);
    }
}

// One at a time: the decoder's memory grows with the number of pixels, and it fills a device with
// one picture already.
void FluxPipeline::decode(const Floats& tokens, const Request& request, const Run& run,
                          const CancelToken& cancel, std::vector<std::uint8_t>& pixels) {
    const LatentSpec& spec = bundle().manifest.latents;
    Floats latents = unpack(tokens, request.height, request.width, spec);
    unscale(latents, spec);
    Shape one = latents.shape;
    one[0] = 1;
    const Shape wanted{1, 3, request.height, request.width};
    const std::int64_t plane = request.height * request.width;
    pixels.resize(static_cast<std::size_t>(request.batch() * plane * 3));
    for (std::int64_t picture = 0; picture < request.batch(); ++picture) {
        cancel.check("before decoding picture " + std::to_string(picture + 1) + " of " +
                     std::to_string(request.batch()));
        const Outputs outputs =
            run("vae_decoder", {{"latents", View(one, latents.data() + picture * count(one))}});
        const Floats& decoded = outputs.at("images");
        if (decoded.shape != wanted) {
            throw Error(ErrorCode::engine, "The vae_decoder gave " + shown(decoded.shape) +
                                               " where a picture is " + shown(wanted) +
                                               ". Build the bundle again with `fluxdeploy "
                                               "build`.");
        }
        std::uint8_t* to = pixels.data() + picture * plane * 3;
        for (std::int64_t at = 0; at < plane; ++at) {
            for (std::int64_t c = 0; c < 3; ++c) {
                const float y = decoded.data()[c * plane + at];
                const float value = std::clamp(y * 0.5f + 0.5f, 0.0f, 1.0f);
                // A half goes to the even one, as the processor's rounding is.
                *to++ = static_cast<std::uint8_t>(std::nearbyint(value * 255.0f));
            }
        }
    }
    components_.release("vae_decoder");
}

void FluxPipeline::check(const std::function<void(const std::string&, const Deviation&)>& each) {
    const CancelToken token;
    const Turns::Taken turn(turns_, token);
    const ReleaseAll on_exit(components_);
    for (const auto& [component, record] : bundle().manifest.components) {
        if (!record.golden) continue;
        const Deviation deviation = measure_component(components_.engine(component),
                                                      bundle().path(record.golden->path).string());
        components_.release(component);
        if (each) each(component, deviation);
        if (deviation.max_error > record.golden->max_error ||
            deviation.cosine < record.golden->min_cosine) {
            throw Error(ErrorCode::numeric,
                        component + " is off PyTorch by " +
                            short_number(deviation.max_error, "%.2g") + " of its range (cosine " +
                            short_number(deviation.cosine, "%.6f") + "); allowed are " +
                            general(record.golden->max_error) + " and " +
                            general(record.golden->min_cosine) + ". Use a wider precision for it.");
        }
    }
}

}  // namespace fluxdeploy
