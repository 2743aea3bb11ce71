// The C interface over the host: handles are its objects, and exceptions become codes.
#define FLUXDEPLOY_NO_CXX
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "arguments.hpp"
#include "errors.hpp"
#include "files/disk.hpp"
#include "files/png.hpp"
#include "fluxdeploy/fluxdeploy.h"
#include "host/input_images.hpp"
#include "host/outpainting.hpp"
#include "host/pipeline.hpp"
#include "sampling/noise.hpp"

struct fluxdeploy_error {
    fluxdeploy_code code;
    std::string message;
};

struct fluxdeploy_options {
    std::string runtime = "auto";
    fluxdeploy::EngineOptions engines;
    bool low_vram = false;
};

struct fluxdeploy_pipeline {
    std::unique_ptr<fluxdeploy::FluxPipeline> pipeline;
};

struct fluxdeploy_request {
    fluxdeploy::Arguments arguments;
};

struct fluxdeploy_cancel {
    fluxdeploy::CancelToken token;
};

struct fluxdeploy_result {
    fluxdeploy::Result result;
};

struct fluxdeploy_picture {
    fluxdeploy::Picture picture;
    std::vector<std::uint8_t> mask;
    std::string sha256;
};

namespace {

using fluxdeploy::Error;
using fluxdeploy::ErrorCode;

// More than a bundle has.
constexpr std::int64_t kMostControlNets = 100;

// The error of a code, if memory allows and somebody wants to know.
fluxdeploy_code fail(fluxdeploy_error** error, fluxdeploy_code code, const char* message) noexcept {
    if (error == nullptr) return code;
    try {
        *error = new fluxdeploy_error{code, message};
    } catch (...) {
        *error = nullptr;
    }
    return code;
}

// Does `work`; whatever it raises becomes a code.
template <class Work>
fluxdeploy_code guarded(fluxdeploy_error** error, Work work) noexcept {
    if (error != nullptr) *error = nullptr;
    try {
        work();
        return FLUXDEPLOY_OK;
    } catch (const Error& caught) {
        return fail(error, static_cast<fluxdeploy_code>(caught.code()), caught.what());
    } catch (const std::bad_alloc&) {
        return fail(error, FLUXDEPLOY_INTERNAL,
                    "Memory ran out; close other programs, or ask for less at once.");
    } catch (const std::exception& caught) {
        return fail(error, FLUXDEPLOY_INTERNAL, caught.what());
    } catch (...) {
        return fail(error, FLUXDEPLOY_INTERNAL, "An unknown error was raised.");
    }
}

template <class T>
T* made() noexcept {
    try {
        return new T;
    } catch (...) {
        return nullptr;
    }
}

template <class T>
T& given(T* pointer, const char* name) {
    if (pointer == nullptr) {
        throw Error(ErrorCode::usage, std::string("`") + name + "` is NULL. Give one.");
    }
    return *pointer;
}

template <class T>
std::vector<T> copied(const T* values, std::size_t count, const char* name) {
    if (count == 0) return {};
    given(values, name);
    return {values, values + count};
}

fluxdeploy::Prompt text_prompt(const char* text, std::size_t size) {
    fluxdeploy::Prompt prompt;
    if (size > 0) prompt.text.assign(&given(text, "text"), size);
    return prompt;
}

fluxdeploy::Prompt ids_prompt(const std::int32_t* clip, std::size_t clip_count,
                              const std::int32_t* t5, std::size_t t5_count) {
    fluxdeploy::Prompt prompt;
    prompt.tokenized = true;
    prompt.clip = copied(clip, clip_count, "clip");
    prompt.t5 = copied(t5, t5_count, "t5");
    return prompt;
}

// An array of a caller's shape, without numbers where it has none; raises for more than memory
// holds.
fluxdeploy::Floats array(const float* values, const std::int64_t* shape, std::size_t rank) {
    constexpr std::int64_t most = std::int64_t{1} << 40;
    fluxdeploy::Floats made;
    made.shape = copied(shape, rank, "shape");
    std::int64_t size = 1;
    for (const std::int64_t axis : made.shape) {
        if (axis < 1) return made;
        if (size > most / axis) {
            throw Error(ErrorCode::usage, "An array " + fluxdeploy::shown(made.shape) +
                                              " cannot be. Give the sizes of yours.");
        }
        size *= axis;
    }
    made.values = copied(values, static_cast<std::size_t>(size), "values");
    return made;
}

// Bytes of RGB; raises for sizes that no memory holds.
std::size_t rgb_bytes(std::int64_t width, std::int64_t height) {
    constexpr std::int64_t most = std::int64_t{1} << 40;
    if (width < 1 || height < 1 || width > most / height) {
        throw Error(ErrorCode::usage, "A picture of " + std::to_string(width) + "x" +
                                          std::to_string(height) +
                                          " pixels cannot be. Give its width and height.");
    }
    return static_cast<std::size_t>(width * height) * 3;
}

fluxdeploy::Picture picture_of(const std::uint8_t* rgb, std::int64_t width, std::int64_t height) {
    fluxdeploy::Picture picture;
    picture.rgb = copied(rgb, rgb_bytes(width, height), "rgb");
    picture.width = width;
    picture.height = height;
    return picture;
}

}  // namespace

extern "C" {

uint32_t fluxdeploy_api_version(void) { return FLUXDEPLOY_API_VERSION; }
const char* fluxdeploy_version(void) { return FLUXDEPLOY_VERSION; }

// ---- Errors

fluxdeploy_code fluxdeploy_error_code(const fluxdeploy_error* error) {
    return error == nullptr ? FLUXDEPLOY_OK : error->code;
}
const char* fluxdeploy_error_message(const fluxdeploy_error* error) {
    return error == nullptr ? "" : error->message.c_str();
}
void fluxdeploy_error_free(fluxdeploy_error* error) { delete error; }

// ---- Options

fluxdeploy_options* fluxdeploy_options_new(void) { return made<fluxdeploy_options>(); }
void fluxdeploy_options_free(fluxdeploy_options* options) { delete options; }

fluxdeploy_code fluxdeploy_options_set_runtime(fluxdeploy_options* options, const char* name) {
    return guarded(nullptr, [&] { given(options, "options").runtime = &given(name, "name"); });
}
void fluxdeploy_options_set_threads(fluxdeploy_options* options, int64_t threads) {
    options->engines.threads = threads;
}
void fluxdeploy_options_set_device(fluxdeploy_options* options, int64_t device) {
    options->engines.device = device;
}
void fluxdeploy_options_set_low_vram(fluxdeploy_options* options, int low_vram) {
    options->low_vram = low_vram != 0;
}
fluxdeploy_code fluxdeploy_options_set_library(fluxdeploy_options* options, const char* runtime,
                                               const char* path) {
    return guarded(nullptr, [&] {
        given(options, "options").engines.libraries[&given(runtime, "runtime")] =
            &given(path, "path");
    });
}

// ---- Pipelines

fluxdeploy_code fluxdeploy_pipeline_open(const char* path, const fluxdeploy_options* options,
                                         fluxdeploy_pipeline** pipeline, fluxdeploy_error** error) {
    return guarded(error, [&] {
        given(pipeline, "pipeline") = nullptr;
        const fluxdeploy_options defaults;
        const fluxdeploy_options& chosen = options == nullptr ? defaults : *options;
        auto opened = std::make_unique<fluxdeploy::FluxPipeline>(
            &given(path, "path"), chosen.runtime, chosen.engines, chosen.low_vram);
        *pipeline = new fluxdeploy_pipeline{std::move(opened)};
    });
}

fluxdeploy_code fluxdeploy_pipeline_clone(const fluxdeploy_pipeline* pipeline,
                                          fluxdeploy_pipeline** clone, fluxdeploy_error** error) {
    return guarded(error, [&] {
        given(clone, "clone") = nullptr;
        *clone = new fluxdeploy_pipeline{given(pipeline, "pipeline").pipeline->clone()};
    });
}

void fluxdeploy_pipeline_free(fluxdeploy_pipeline* pipeline) { delete pipeline; }

fluxdeploy_code fluxdeploy_pipeline_load(fluxdeploy_pipeline* pipeline, fluxdeploy_error** error) {
    return guarded(error, [&] { given(pipeline, "pipeline").pipeline->load(); });
}

const char* fluxdeploy_pipeline_bundle_hash(const fluxdeploy_pipeline* pipeline) {
    return pipeline->pipeline->bundle().content_hash.c_str();
}

double fluxdeploy_pipeline_default(const fluxdeploy_pipeline* pipeline, const char* name) {
    const fluxdeploy::Defaults& defaults = pipeline->pipeline->bundle().manifest.defaults;
    const std::pair<const char*, double> all[] = {
        {"height", static_cast<double>(defaults.height)},
        {"width", static_cast<double>(defaults.width)},
        {"num_inference_steps", static_cast<double>(defaults.num_inference_steps)},
        {"guidance_scale", defaults.guidance_scale},
        {"max_sequence_length", static_cast<double>(defaults.max_sequence_length)},
        {"strength", defaults.strength},
    };
    for (const auto& [known, value] : all) {
        if (name != nullptr && std::string_view(known) == name) return value;
    }
    return std::numeric_limits<double>::quiet_NaN();
}

int fluxdeploy_pipeline_does(const fluxdeploy_pipeline* pipeline, const char* task) {
    return task != nullptr && pipeline->pipeline->bundle().manifest.does(task) ? 1 : 0;
}

int64_t fluxdeploy_pipeline_controlnets(const fluxdeploy_pipeline* pipeline) {
    return static_cast<std::int64_t>(pipeline->pipeline->bundle().manifest.controlnets.size());
}

fluxdeploy_code fluxdeploy_pipeline_tokenize(const fluxdeploy_pipeline* pipeline,
                                             const char* tokenizer, const char* prompt,
                                             size_t prompt_size, int64_t length, int32_t* ids,
                                             size_t capacity, size_t* count,
                                             fluxdeploy_error** error) {
    return guarded(error, [&] {
        const auto& both = given(pipeline, "pipeline").pipeline->tokenizers();
        const std::string name = &given(tokenizer, "tokenizer");
        if (name != "clip" && name != "t5") {
            throw Error(ErrorCode::usage,
                        "There is no tokenizer '" + name + "'. There are clip and t5.");
        }
        const auto& own = name == "clip" ? both.clip : both.t5;
        const std::string text = text_prompt(prompt, prompt_size).text;
        const auto made = length == 0 ? own.encode(text) : own.encode(text, length);
        given(count, "count") = made.size();
        if (made.size() <= capacity) std::copy(made.begin(), made.end(), &given(ids, "ids"));
    });
}

fluxdeploy_code fluxdeploy_pipeline_check(fluxdeploy_pipeline* pipeline,
                                          fluxdeploy_check_callback callback, void* user,
                                          fluxdeploy_error** error) {
    return guarded(error, [&] {
        given(pipeline, "pipeline")
            .pipeline->check([&](const std::string& component, const fluxdeploy::Deviation& own) {
                if (callback != nullptr) {
                    callback(user, component.c_str(), own.max_error, own.cosine);
                }
            });
    });
}

// ---- Requests

fluxdeploy_request* fluxdeploy_request_new(void) { return made<fluxdeploy_request>(); }
void fluxdeploy_request_free(fluxdeploy_request* request) { delete request; }

fluxdeploy_code fluxdeploy_request_add_prompt(fluxdeploy_request* request, const char* text,
                                              size_t size) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.words.prompts.push_back(text_prompt(text, size));
    });
}
fluxdeploy_code fluxdeploy_request_add_negative_prompt(fluxdeploy_request* request,
                                                       const char* text, size_t size) {
    return guarded(nullptr, [&] {
        given(request, "request")
            .arguments.negative_words.prompts.push_back(text_prompt(text, size));
    });
}
fluxdeploy_code fluxdeploy_request_add_prompt_ids(fluxdeploy_request* request, const int32_t* clip,
                                                  size_t clip_count, const int32_t* t5,
                                                  size_t t5_count) {
    return guarded(nullptr, [&] {
        given(request, "request")
            .arguments.words.prompts.push_back(ids_prompt(clip, clip_count, t5, t5_count));
    });
}
fluxdeploy_code fluxdeploy_request_add_negative_prompt_ids(fluxdeploy_request* request,
                                                           const int32_t* clip, size_t clip_count,
                                                           const int32_t* t5, size_t t5_count) {
    return guarded(nullptr, [&] {
        given(request, "request")
            .arguments.negative_words.prompts.push_back(ids_prompt(clip, clip_count, t5, t5_count));
    });
}
fluxdeploy_code fluxdeploy_request_add_prompt_2(fluxdeploy_request* request, const char* text,
                                                size_t size) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.words.prompts_2.push_back(text_prompt(text, size).text);
    });
}
fluxdeploy_code fluxdeploy_request_add_negative_prompt_2(fluxdeploy_request* request,
                                                         const char* text, size_t size) {
    return guarded(nullptr, [&] {
        given(request, "request")
            .arguments.negative_words.prompts_2.push_back(text_prompt(text, size).text);
    });
}
fluxdeploy_code fluxdeploy_request_set_prompt_embeds(fluxdeploy_request* request,
                                                     const float* values, const int64_t* shape,
                                                     size_t rank) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.words.prompt_embeds = array(values, shape, rank);
    });
}
fluxdeploy_code fluxdeploy_request_set_pooled_prompt_embeds(fluxdeploy_request* request,
                                                            const float* values,
                                                            const int64_t* shape, size_t rank) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.words.pooled_prompt_embeds = array(values, shape, rank);
    });
}
fluxdeploy_code fluxdeploy_request_set_negative_prompt_embeds(fluxdeploy_request* request,
                                                              const float* values,
                                                              const int64_t* shape, size_t rank) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.negative_words.prompt_embeds =
            array(values, shape, rank);
    });
}
fluxdeploy_code fluxdeploy_request_set_negative_pooled_prompt_embeds(fluxdeploy_request* request,
                                                                     const float* values,
                                                                     const int64_t* shape,
                                                                     size_t rank) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.negative_words.pooled_prompt_embeds =
            array(values, shape, rank);
    });
}
void fluxdeploy_request_set_true_cfg_scale(fluxdeploy_request* request, double scale) {
    request->arguments.true_cfg_scale = scale;
}
void fluxdeploy_request_set_height(fluxdeploy_request* request, int64_t height) {
    request->arguments.height = height;
}
void fluxdeploy_request_set_width(fluxdeploy_request* request, int64_t width) {
    request->arguments.width = width;
}
void fluxdeploy_request_set_num_inference_steps(fluxdeploy_request* request, int64_t steps) {
    request->arguments.num_inference_steps = steps;
}
void fluxdeploy_request_set_guidance_scale(fluxdeploy_request* request, double scale) {
    request->arguments.guidance_scale = scale;
}
void fluxdeploy_request_set_num_images_per_prompt(fluxdeploy_request* request, int64_t count) {
    request->arguments.num_images_per_prompt = count;
}
void fluxdeploy_request_set_max_sequence_length(fluxdeploy_request* request, int64_t length) {
    request->arguments.max_sequence_length = length;
}
void fluxdeploy_request_set_seed(fluxdeploy_request* request, uint64_t seed) {
    request->arguments.seed = seed;
}
fluxdeploy_code fluxdeploy_request_set_seeds(fluxdeploy_request* request, const uint64_t* seeds,
                                             size_t count) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.seeds = copied(seeds, count, "seeds");
    });
}
fluxdeploy_code fluxdeploy_request_set_sigmas(fluxdeploy_request* request, const float* sigmas,
                                              size_t count) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.sigmas = copied(sigmas, count, "sigmas");
    });
}
fluxdeploy_code fluxdeploy_request_set_latents(fluxdeploy_request* request, const float* latents,
                                               size_t count) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.latents = copied(latents, count, "latents");
    });
}
fluxdeploy_code fluxdeploy_request_add_image(fluxdeploy_request* request, const uint8_t* rgb,
                                             int64_t width, int64_t height) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.images.push_back(picture_of(rgb, width, height));
    });
}
fluxdeploy_code fluxdeploy_request_add_mask_image(fluxdeploy_request* request, const uint8_t* rgb,
                                                  int64_t width, int64_t height) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.mask_images.push_back(picture_of(rgb, width, height));
    });
}
void fluxdeploy_request_set_strength(fluxdeploy_request* request, double strength) {
    request->arguments.strength = strength;
}
void fluxdeploy_request_set_padding_mask_crop(fluxdeploy_request* request, int64_t pixels) {
    request->arguments.padding_mask_crop = pixels;
}
fluxdeploy_code fluxdeploy_request_add_control_image(fluxdeploy_request* request,
                                                     const uint8_t* rgb, int64_t width,
                                                     int64_t height) {
    return fluxdeploy_request_add_controlnet_image(request, 0, rgb, width, height);
}
fluxdeploy_code fluxdeploy_request_add_controlnet_image(fluxdeploy_request* request,
                                                        int64_t controlnet, const uint8_t* rgb,
                                                        int64_t width, int64_t height) {
    return guarded(nullptr, [&] {
        auto& sets = given(request, "request").arguments.control_images;
        const auto place = static_cast<std::size_t>(
            fluxdeploy::check_integer("controlnet", controlnet, 0, kMostControlNets - 1));
        fluxdeploy::Picture picture = picture_of(rgb, width, height);
        if (sets.size() <= place) sets.resize(place + 1);
        sets[place].push_back(std::move(picture));
    });
}
fluxdeploy_code fluxdeploy_request_set_control_mode(fluxdeploy_request* request,
                                                    const int64_t* modes, size_t count) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.control_mode = copied(modes, count, "modes");
    });
}
fluxdeploy_code fluxdeploy_request_set_controlnet_conditioning_scale(fluxdeploy_request* request,
                                                                     const double* scales,
                                                                     size_t count) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.controlnet_conditioning_scale =
            copied(scales, count, "scales");
    });
}
fluxdeploy_code fluxdeploy_request_set_control_guidance_start(fluxdeploy_request* request,
                                                              const double* starts, size_t count) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.control_guidance_start =
            copied(starts, count, "starts");
    });
}
fluxdeploy_code fluxdeploy_request_set_control_guidance_end(fluxdeploy_request* request,
                                                            const double* ends, size_t count) {
    return guarded(nullptr, [&] {
        given(request, "request").arguments.control_guidance_end = copied(ends, count, "ends");
    });
}
void fluxdeploy_request_set_references(fluxdeploy_request* request, int64_t count) {
    request->arguments.references = count;
}
void fluxdeploy_request_set_max_area(fluxdeploy_request* request, int64_t pixels) {
    request->arguments.max_area = pixels;
}
void fluxdeploy_request_set_auto_resize(fluxdeploy_request* request, int resize) {
    request->arguments.auto_resize = resize != 0;
}
fluxdeploy_code fluxdeploy_request_set_sampler(fluxdeploy_request* request, const char* name) {
    return guarded(nullptr,
                   [&] { given(request, "request").arguments.sampler = &given(name, "name"); });
}
fluxdeploy_code fluxdeploy_request_set_skip(fluxdeploy_request* request, const int64_t* steps,
                                            size_t count) {
    return guarded(
        nullptr, [&] { given(request, "request").arguments.skip = copied(steps, count, "steps"); });
}
void fluxdeploy_request_set_skip_recorded(fluxdeploy_request* request, int recorded) {
    request->arguments.skip_recorded = recorded != 0;
}

fluxdeploy_code fluxdeploy_request_set_callback(fluxdeploy_request* request,
                                                fluxdeploy_step_callback callback, void* user) {
    return guarded(nullptr, [&] {
        auto& own = given(request, "request").arguments.on_step_end;
        own = nullptr;
        if (callback == nullptr) return;
        own = [callback, user](std::int64_t step, std::int64_t steps, float sigma,
                               fluxdeploy::Floats& latents,
                               const fluxdeploy::PreviewPictures* previews) {
            const fluxdeploy_step view{step + 1,
                                       steps,
                                       static_cast<double>(sigma * 1000.0f),
                                       latents.data(),
                                       latents.shape[0],
                                       latents.shape[1],
                                       latents.shape[2],
                                       previews ? previews->rgb.data() : nullptr,
                                       previews ? previews->width : 0,
                                       previews ? previews->height : 0};
            return callback(user, &view) == 0;
        };
    });
}

void fluxdeploy_request_set_preview(fluxdeploy_request* request, int preview) {
    request->arguments.preview = preview != 0;
}

fluxdeploy_cancel* fluxdeploy_cancel_new(void) { return made<fluxdeploy_cancel>(); }
void fluxdeploy_cancel_free(fluxdeploy_cancel* cancel) { delete cancel; }
void fluxdeploy_cancel_now(fluxdeploy_cancel* cancel) { cancel->token.cancel(); }
void fluxdeploy_request_set_cancel(fluxdeploy_request* request, fluxdeploy_cancel* cancel) {
    request->arguments.cancel = cancel->token;
}

// ---- Pictures

fluxdeploy_code fluxdeploy_pipeline_generate(fluxdeploy_pipeline* pipeline,
                                             const fluxdeploy_request* request,
                                             fluxdeploy_result** result, fluxdeploy_error** error) {
    return guarded(error, [&] {
        given(result, "result") = nullptr;
        auto made = std::make_unique<fluxdeploy_result>();
        made->result =
            given(pipeline, "pipeline").pipeline->generate(given(request, "request").arguments);
        *result = made.release();
    });
}

void fluxdeploy_result_free(fluxdeploy_result* result) { delete result; }
int64_t fluxdeploy_result_count(const fluxdeploy_result* result) { return result->result.count; }
int64_t fluxdeploy_result_width(const fluxdeploy_result* result) { return result->result.width; }
int64_t fluxdeploy_result_height(const fluxdeploy_result* result) { return result->result.height; }
const uint8_t* fluxdeploy_result_pixels(const fluxdeploy_result* result, int64_t index) {
    const auto& own = result->result;
    if (index < 0 || index >= own.count) return nullptr;
    return own.pixels.data() + index * own.width * own.height * 3;
}
int64_t fluxdeploy_result_steps(const fluxdeploy_result* result) { return result->result.steps; }
int fluxdeploy_result_has_seed(const fluxdeploy_result* result) {
    return result->result.seed.has_value() ? 1 : 0;
}
uint64_t fluxdeploy_result_seed(const fluxdeploy_result* result) {
    return result->result.seed.value_or(0);
}
const char* fluxdeploy_result_notice(const fluxdeploy_result* result, size_t index) {
    const auto& notices = result->result.notices;
    return index < notices.size() ? notices[index].c_str() : nullptr;
}

// ---- Files and noise

fluxdeploy_code fluxdeploy_picture_read(const char* path, fluxdeploy_picture** picture,
                                        fluxdeploy_error** error) {
    return guarded(error, [&] {
        given(picture, "picture") = nullptr;
        auto read = std::make_unique<fluxdeploy_picture>();
        read->picture = fluxdeploy::read_png(&given(path, "path"));
        read->mask = fluxdeploy::mask_of(read->picture);
        read->sha256 = fluxdeploy::sha256_file(path);
        *picture = read.release();
    });
}
fluxdeploy_code fluxdeploy_outpaint_canvas(const uint8_t* rgb, int64_t width, int64_t height,
                                           int64_t left, int64_t top, int64_t right, int64_t bottom,
                                           fluxdeploy_picture** canvas, fluxdeploy_error** error) {
    return guarded(error, [&] {
        given(canvas, "canvas") = nullptr;
        auto made = std::make_unique<fluxdeploy_picture>();
        fluxdeploy::Canvas both =
            fluxdeploy::outpaint_canvas(picture_of(rgb, width, height), left, top, right, bottom);
        made->picture = std::move(both.image);
        made->mask = std::move(both.mask.rgb);
        *canvas = made.release();
    });
}
void fluxdeploy_picture_free(fluxdeploy_picture* picture) { delete picture; }
int64_t fluxdeploy_picture_width(const fluxdeploy_picture* picture) {
    return picture->picture.width;
}
int64_t fluxdeploy_picture_height(const fluxdeploy_picture* picture) {
    return picture->picture.height;
}
const uint8_t* fluxdeploy_picture_rgb(const fluxdeploy_picture* picture) {
    return picture->picture.rgb.data();
}
const uint8_t* fluxdeploy_picture_mask(const fluxdeploy_picture* picture) {
    return picture->mask.data();
}
const char* fluxdeploy_picture_sha256(const fluxdeploy_picture* picture) {
    return picture->sha256.c_str();
}

fluxdeploy_code fluxdeploy_write_png(const char* path, const uint8_t* rgb, int64_t width,
                                     int64_t height, const char* const* keys,
                                     const char* const* values, size_t text_count,
                                     fluxdeploy_error** error) {
    return guarded(error, [&] {
        fluxdeploy::PngText text;
        for (std::size_t i = 0; i < text_count; ++i) {
            given(keys, "keys");
            given(values, "values");
            text.emplace_back(&given(keys[i], "keys"), &given(values[i], "values"));
        }
        fluxdeploy::write_png(&given(path, "path"), picture_of(rgb, width, height), text);
    });
}

fluxdeploy_code fluxdeploy_noise(uint64_t seed, float* values, size_t count,
                                 fluxdeploy_error** error) {
    return guarded(error, [&] {
        if (count == 0) return;
        fluxdeploy::TorchGenerator(seed).normal(&given(values, "values"),
                                                static_cast<std::int64_t>(count));
    });
}

}  // extern "C"
