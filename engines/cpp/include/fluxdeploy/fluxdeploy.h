/* fluxdeploy: pictures from a FLUX.1 bundle, in C and in C++.
 *
 * The first half is a plain C interface: opaque handles, no structure whose size a program knows
 * but `fluxdeploy_step`. Below it, for C++17, the class `fluxdeploy::Pipeline` says the same.
 *
 * Rules for all of it:
 * - A function that can fail returns a `fluxdeploy_code`, and where `error` is not NULL it puts a
 *   `fluxdeploy_error` there, which the caller frees; on success it puts NULL. No exception leaves
 * a function of C.
 * - What a function `_new`, `_open`, `_clone` or `_generate` gave is freed with the `_free` of its
 *   type, which takes NULL too. Arrays that a function returns belong to the handle they came from.
 *   What is passed in is copied, and may be freed at once. Handles that are read or set are not
 * NULL.
 * - Text is UTF-8. Sizes in pixels, latents are float32 [B, L, C], packed, as docs/bundle.md has
 * it.
 * - Threads: a pipeline may be used by several threads, whose calls take turns in the order of
 *   asking. Pipelines are independent of each other: `fluxdeploy_pipeline_clone` gives a second one
 *   that shares the weights, and both run at the same time. A `fluxdeploy_cancel` may be used by
 * any thread at any time. Any other handle belongs to one thread at a time.
 * - There is no global state, and nothing is written to the terminal.
 */
#ifndef FLUXDEPLOY_FLUXDEPLOY_H
#define FLUXDEPLOY_FLUXDEPLOY_H

#include <stddef.h>
#include <stdint.h>

#define FLUXDEPLOY_VERSION "0.1.0"
/* Grows with each function or field that is added; the library's soversion with each that changes.
 */
#define FLUXDEPLOY_API_VERSION 6

#if defined(FLUXDEPLOY_STATIC)
#define FLUXDEPLOY_API
#else
#define FLUXDEPLOY_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the library that is loaded, as FLUXDEPLOY_API_VERSION and FLUXDEPLOY_VERSION. */
FLUXDEPLOY_API uint32_t fluxdeploy_api_version(void);
FLUXDEPLOY_API const char* fluxdeploy_version(void);

/* ---- Errors ---------------------------------------------------------------------------------- */

typedef enum fluxdeploy_code {
    FLUXDEPLOY_OK = 0,
    FLUXDEPLOY_USAGE = 1,              /* an argument is outside its allowed range */
    FLUXDEPLOY_BUNDLE = 2,             /* a bundle, or a file of it, is missing or broken */
    FLUXDEPLOY_ENGINE = 3,             /* an engine could not be opened or run */
    FLUXDEPLOY_NUMERIC = 4,            /* NaN or infinity, or an output past its gate */
    FLUXDEPLOY_CANCELLED = 5,          /* the caller cancelled; no picture was made */
    FLUXDEPLOY_MISSING_DEPENDENCY = 6, /* a runtime is needed that is not there */
    FLUXDEPLOY_INTERNAL = 7            /* anything else: a full disk, memory at its end */
} fluxdeploy_code;

typedef struct fluxdeploy_error fluxdeploy_error;

FLUXDEPLOY_API fluxdeploy_code fluxdeploy_error_code(const fluxdeploy_error* error);
/* One or two sentences for the user: what failed, what is allowed, what to do. The same words as
 * the Python package's. */
FLUXDEPLOY_API const char* fluxdeploy_error_message(const fluxdeploy_error* error);
FLUXDEPLOY_API void fluxdeploy_error_free(fluxdeploy_error* error);

/* ---- Options of a pipeline ------------------------------------------------------------------- */

typedef struct fluxdeploy_options fluxdeploy_options;

/* NULL where memory is at its end; each setter keeps the last value. */
FLUXDEPLOY_API fluxdeploy_options* fluxdeploy_options_new(void);
FLUXDEPLOY_API void fluxdeploy_options_free(fluxdeploy_options* options);
/* "auto", which is the default: the best that can run here, or one by its name: "tensorrt",
 * "tensorrt-rtx", "onnxruntime", "openvino". */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_options_set_runtime(fluxdeploy_options* options,
                                                              const char* name);
/* CPU threads of a run; the runtime's own choice where it is not set. */
FLUXDEPLOY_API void fluxdeploy_options_set_threads(fluxdeploy_options* options, int64_t threads);
/* The GPU, by its index; 0 where it is not set. */
FLUXDEPLOY_API void fluxdeploy_options_set_device(fluxdeploy_options* options, int64_t device);
/* Not 0: an engine is open only while it is needed. Less memory, and more time to load. */
FLUXDEPLOY_API void fluxdeploy_options_set_low_vram(fluxdeploy_options* options, int low_vram);
/* The shared library of a runtime, where the system does not find it by its name, or another one
 * than it finds: a path that `dlopen` takes. The default is what the build was configured with. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_options_set_library(fluxdeploy_options* options,
                                                              const char* runtime,
                                                              const char* path);

/* ---- Pipelines ------------------------------------------------------------------------------- */

typedef struct fluxdeploy_pipeline fluxdeploy_pipeline;

/* Open the bundle in the folder `path`; `options` may be NULL. Engines are opened by the first call
 * that needs them. Fails for a folder that is no bundle, and for an unknown runtime. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_pipeline_open(const char* path,
                                                        const fluxdeploy_options* options,
                                                        fluxdeploy_pipeline** pipeline,
                                                        fluxdeploy_error** error);
/* A second pipeline of the same bundle, which shares the opened engines and with them the weights.
 * It costs some kilobytes, and calls of the two run at the same time. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_pipeline_clone(const fluxdeploy_pipeline* pipeline,
                                                         fluxdeploy_pipeline** clone,
                                                         fluxdeploy_error** error);
/* No call of the pipeline may be running. */
FLUXDEPLOY_API void fluxdeploy_pipeline_free(fluxdeploy_pipeline* pipeline);

/* Open the engines of a picture now, so that the first call need not. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_pipeline_load(fluxdeploy_pipeline* pipeline,
                                                        fluxdeploy_error** error);

/* SHA-256 of the manifest's bytes, as 64 hex digits: it names the whole bundle. */
FLUXDEPLOY_API const char* fluxdeploy_pipeline_bundle_hash(const fluxdeploy_pipeline* pipeline);

/* What holds where a request says nothing; of "height", "width", "num_inference_steps",
 * "guidance_scale", "max_sequence_length" and "strength". NaN for another name. */
FLUXDEPLOY_API double fluxdeploy_pipeline_default(const fluxdeploy_pipeline* pipeline,
                                                  const char* name);

/* Not 0 where the bundle's model was trained for a task: of "text to image", "image to image",
 * "inpainting", "fill", "control", "kontext" and "controlnet". Since version 5. */
FLUXDEPLOY_API int fluxdeploy_pipeline_does(const fluxdeploy_pipeline* pipeline, const char* task);
/* How many ControlNets can run beside the bundle's transformer. Since version 6. */
FLUXDEPLOY_API int64_t fluxdeploy_pipeline_controlnets(const fluxdeploy_pipeline* pipeline);

/* The ids of a prompt, padded or cut to `length`, by the tokenizer "clip" or "t5". A length of 0 is
 * the tokenizer's largest. `ids` has room for `capacity`; `*count` becomes how many there are, and
 * the ids are written where they fit. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_pipeline_tokenize(const fluxdeploy_pipeline* pipeline,
                                                            const char* tokenizer,
                                                            const char* prompt, size_t prompt_size,
                                                            int64_t length, int32_t* ids,
                                                            size_t capacity, size_t* count,
                                                            fluxdeploy_error** error);

/* What one component's engine makes of its golden inputs. `max_error` is max|x - r| / max|r|
 * against PyTorch's outputs r, `cosine` that of the flattened tensors. */
typedef void (*fluxdeploy_check_callback)(void* user, const char* component, double max_error,
                                          double cosine);

/* Hold every component that has golden tensors against them. Fails with FLUXDEPLOY_NUMERIC at the
 * first that is past its gate; the callback may be NULL and is called for that one too. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_pipeline_check(fluxdeploy_pipeline* pipeline,
                                                         fluxdeploy_check_callback callback,
                                                         void* user, fluxdeploy_error** error);

/* ---- Requests -------------------------------------------------------------------------------- */

typedef struct fluxdeploy_request fluxdeploy_request;

/* What to make. What is not set has the bundle's default, or as docs/bundle.md says. Values are
 * checked by `fluxdeploy_pipeline_generate`. A request may be used again. NULL where memory is at
 * its end; the functions that copy return FLUXDEPLOY_INTERNAL then. */
FLUXDEPLOY_API fluxdeploy_request* fluxdeploy_request_new(void);
FLUXDEPLOY_API void fluxdeploy_request_free(fluxdeploy_request* request);

/* One more prompt, of `size` bytes. A picture, or several, is made of each. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_add_prompt(fluxdeploy_request* request,
                                                             const char* text, size_t size);
/* One for all prompts, or one for each; used where true_cfg_scale is above 1. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_add_negative_prompt(fluxdeploy_request* request,
                                                                      const char* text,
                                                                      size_t size);
/* The same as token ids: CLIP's, padded to its length, and T5's, padded to max_sequence_length,
 * which is their number where it is not set. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_add_prompt_ids(fluxdeploy_request* request,
                                                                 const int32_t* clip,
                                                                 size_t clip_count,
                                                                 const int32_t* t5,
                                                                 size_t t5_count);
FLUXDEPLOY_API fluxdeploy_code
fluxdeploy_request_add_negative_prompt_ids(fluxdeploy_request* request, const int32_t* clip,
                                           size_t clip_count, const int32_t* t5, size_t t5_count);
/* What T5 reads instead of the prompt, which is then CLIP's alone: one for all prompts, or one for
 * each; a single empty one stands for the prompt. Since version 4. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_add_prompt_2(fluxdeploy_request* request,
                                                               const char* text, size_t size);
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_add_negative_prompt_2(fluxdeploy_request* request,
                                                                        const char* text,
                                                                        size_t size);
/* In place of prompts, what T5 and CLIP make of P of them: float32 [P, S, E] and [P, E'], whose
 * sizes are `shape`'s `rank` ones. Negative ones are of P, or of one for all. Since version 4. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_prompt_embeds(fluxdeploy_request* request,
                                                                    const float* values,
                                                                    const int64_t* shape,
                                                                    size_t rank);
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_pooled_prompt_embeds(
    fluxdeploy_request* request, const float* values, const int64_t* shape, size_t rank);
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_negative_prompt_embeds(
    fluxdeploy_request* request, const float* values, const int64_t* shape, size_t rank);
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_negative_pooled_prompt_embeds(
    fluxdeploy_request* request, const float* values, const int64_t* shape, size_t rank);
FLUXDEPLOY_API void fluxdeploy_request_set_true_cfg_scale(fluxdeploy_request* request,
                                                          double scale);
/* Pixels, multiples of 16. */
FLUXDEPLOY_API void fluxdeploy_request_set_height(fluxdeploy_request* request, int64_t height);
FLUXDEPLOY_API void fluxdeploy_request_set_width(fluxdeploy_request* request, int64_t width);
FLUXDEPLOY_API void fluxdeploy_request_set_num_inference_steps(fluxdeploy_request* request,
                                                               int64_t steps);
FLUXDEPLOY_API void fluxdeploy_request_set_guidance_scale(fluxdeploy_request* request,
                                                          double scale);
FLUXDEPLOY_API void fluxdeploy_request_set_num_images_per_prompt(fluxdeploy_request* request,
                                                                 int64_t count);
FLUXDEPLOY_API void fluxdeploy_request_set_max_sequence_length(fluxdeploy_request* request,
                                                               int64_t length);
/* The same seed gives the same picture, in Python too; the system draws one where none is set. */
FLUXDEPLOY_API void fluxdeploy_request_set_seed(fluxdeploy_request* request, uint64_t seed);
/* A seed for each picture, in place of one for all: each has noise of its own then. Since
 * version 4. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_seeds(fluxdeploy_request* request,
                                                            const uint64_t* seeds, size_t count);
/* The noise levels of the steps before shifting, falling, above 0 and at most 1; as many steps are
 * made. Since version 4. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_sigmas(fluxdeploy_request* request,
                                                             const float* sigmas, size_t count);
/* The noise to start from, `count` = B * L * C numbers, in place of a seed's. What fill, control
 * and ControlNets draw besides still comes from the seed. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_latents(fluxdeploy_request* request,
                                                              const float* latents, size_t count);
/* One more picture to start from, RGB in 8 bits, row by row: image to image. It is resized to width
 * and height. One for all pictures that are made, or as many as divide their number. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_add_image(fluxdeploy_request* request,
                                                            const uint8_t* rgb, int64_t width,
                                                            int64_t height);
/* One more mask, of RGB as the image: inpainting. Where it is white, at least 128 of 255 in grey,
 * the image is drawn again; the rest stays as it was. Resized as the image is. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_add_mask_image(fluxdeploy_request* request,
                                                                 const uint8_t* rgb, int64_t width,
                                                                 int64_t height);
/* How much of the image becomes noise, 0 to 1: that share of the steps is made. */
FLUXDEPLOY_API void fluxdeploy_request_set_strength(fluxdeploy_request* request, double strength);
/* Draw only the part of the image around the mask, with so many pixels more on each side, in height
 * x width, and lay it over the image, whose size the pictures have then. Image and mask are one
 * each, of one size. Since version 2. */
FLUXDEPLOY_API void fluxdeploy_request_set_padding_mask_crop(fluxdeploy_request* request,
                                                             int64_t pixels);
/* One more control picture, RGB as the image, for a bundle of a Canny or Depth checkpoint, or with
 * a ControlNet: the edges, depths and so on to draw along. One for all pictures, one a prompt or
 * one a picture. Beside a ControlNet's there may be images, and masks too. Since version 5. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_add_control_image(fluxdeploy_request* request,
                                                                    const uint8_t* rgb,
                                                                    int64_t width, int64_t height);
/* The same for one of several ControlNets, counted from 0 in the order in which the bundle was
 * built with them: each takes its own. Since version 6. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_add_controlnet_image(fluxdeploy_request* request,
                                                                       int64_t controlnet,
                                                                       const uint8_t* rgb,
                                                                       int64_t width,
                                                                       int64_t height);
/* The kind of control, for ControlNets that tell several apart: one for all, or one for each, with
 * -1 for those that know one kind alone. Since version 6. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_control_mode(fluxdeploy_request* request,
                                                                   const int64_t* modes,
                                                                   size_t count);
/* How much ControlNets count, 1 where it is not set: one for all, or one for each. Since
 * version 6. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_controlnet_conditioning_scale(
    fluxdeploy_request* request, const double* scales, size_t count);
/* The parts of the steps, 0 to 1, after which ControlNets count, and after which they no longer do;
 * 0 and 1 where they are not set. One for all, or one for each. Since version 6. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_control_guidance_start(
    fluxdeploy_request* request, const double* starts, size_t count);
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_control_guidance_end(
    fluxdeploy_request* request, const double* ends, size_t count);
/* For a bundle of a Kontext checkpoint, whose images are what to change by words: how many of them
 * each picture is drawn after, one after the other; 1 where it is not set. Since version 5. */
FLUXDEPLOY_API void fluxdeploy_request_set_references(fluxdeploy_request* request, int64_t count);
/* Draw so many pixels, in the proportions of width and height. Since version 5. */
FLUXDEPLOY_API void fluxdeploy_request_set_max_area(fluxdeploy_request* request, int64_t pixels);
/* 0: references become whole tokens, and none of the sizes that FLUX.1 Kontext was trained with.
 * Since version 5. */
FLUXDEPLOY_API void fluxdeploy_request_set_auto_resize(fluxdeploy_request* request, int resize);
/* How steps use the velocity: "euler", which it is where none is set; "ab2" or "dpmpp_2m", of
 * second order at the same cost; "heun" or "midpoint", at twice the cost; "rk4", at four times.
 * Since version 3. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_sampler(fluxdeploy_request* request,
                                                              const char* name);
/* Steps in which the transformer does not run, counted from 0, which is none of them; the velocity
 * is extrapolated along a line. Since version 3. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_skip(fluxdeploy_request* request,
                                                           const int64_t* steps, size_t count);
/* Not 0: skip the steps that `fluxdeploy tune` has found for this bundle, this sampler and so many
 * steps. Since version 3. */
FLUXDEPLOY_API void fluxdeploy_request_set_skip_recorded(fluxdeploy_request* request, int recorded);

/* After a step: `step` of `total` are done, from 1. `timestep` is 1000 times the noise level that
 * the step began at. `latents` are the live ones, float32 [batch, tokens, channels]: they may be
 * changed in place, and are not valid after the callback. Nor is `preview`, since version 6: where
 * it is asked for, `batch` pictures of where the step points at, RGB in 8 bits, one pixel for each
 * latent, row by row; else NULL. */
typedef struct fluxdeploy_step {
    int64_t step;
    int64_t total;
    double timestep;
    float* latents;
    int64_t batch;
    int64_t tokens;
    int64_t channels;
    const uint8_t* preview;
    int64_t preview_width;
    int64_t preview_height;
} fluxdeploy_step;

/* Returns 0 to go on; anything else cancels the call. It runs in the calling thread, and may not
 * call the same pipeline: it has a clone for that. */
typedef int (*fluxdeploy_step_callback)(void* user, const fluxdeploy_step* step);

FLUXDEPLOY_API fluxdeploy_code fluxdeploy_request_set_callback(fluxdeploy_request* request,
                                                               fluxdeploy_step_callback callback,
                                                               void* user);

/* Not 0: the callback is given previews, which cost nearly nothing. Since version 6. */
FLUXDEPLOY_API void fluxdeploy_request_set_preview(fluxdeploy_request* request, int preview);

/* Ends calls from any other thread; it stays cancelled. Several requests may share one, and hold
 * it: it may be freed at once. */
typedef struct fluxdeploy_cancel fluxdeploy_cancel;
FLUXDEPLOY_API fluxdeploy_cancel* fluxdeploy_cancel_new(void);
FLUXDEPLOY_API void fluxdeploy_cancel_free(fluxdeploy_cancel* cancel);
FLUXDEPLOY_API void fluxdeploy_cancel_now(fluxdeploy_cancel* cancel);
FLUXDEPLOY_API void fluxdeploy_request_set_cancel(fluxdeploy_request* request,
                                                  fluxdeploy_cancel* cancel);

/* ---- Pictures -------------------------------------------------------------------------------- */

typedef struct fluxdeploy_result fluxdeploy_result;

/* Make the pictures of a request, prompt by prompt: p0, p0, p1, p1. It returns when they are made.
 */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_pipeline_generate(fluxdeploy_pipeline* pipeline,
                                                            const fluxdeploy_request* request,
                                                            fluxdeploy_result** result,
                                                            fluxdeploy_error** error);
FLUXDEPLOY_API void fluxdeploy_result_free(fluxdeploy_result* result);
FLUXDEPLOY_API int64_t fluxdeploy_result_count(const fluxdeploy_result* result);
FLUXDEPLOY_API int64_t fluxdeploy_result_width(const fluxdeploy_result* result);
FLUXDEPLOY_API int64_t fluxdeploy_result_height(const fluxdeploy_result* result);
/* RGB in 8 bits, height * width * 3 bytes, row by row; NULL for an index that there is not. */
FLUXDEPLOY_API const uint8_t* fluxdeploy_result_pixels(const fluxdeploy_result* result,
                                                       int64_t index);
/* How many steps were made: fewer than asked for in image to image. */
FLUXDEPLOY_API int64_t fluxdeploy_result_steps(const fluxdeploy_result* result);
/* Not 0 where all of these pictures had one seed; 0 where each had its own, and where nothing was
 * drawn beside the caller's latents. */
FLUXDEPLOY_API int fluxdeploy_result_has_seed(const fluxdeploy_result* result);
FLUXDEPLOY_API uint64_t fluxdeploy_result_seed(const fluxdeploy_result* result);
/* Sentences on arguments that did nothing, and on prompts that were cut; NULL after the last. */
FLUXDEPLOY_API const char* fluxdeploy_result_notice(const fluxdeploy_result* result, size_t index);

/* ---- Files and noise ------------------------------------------------------------------------- */

typedef struct fluxdeploy_picture fluxdeploy_picture;

/* The picture in a PNG, as RGB in 8 bits; transparency is dropped. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_picture_read(const char* path,
                                                       fluxdeploy_picture** picture,
                                                       fluxdeploy_error** error);
FLUXDEPLOY_API void fluxdeploy_picture_free(fluxdeploy_picture* picture);
FLUXDEPLOY_API int64_t fluxdeploy_picture_width(const fluxdeploy_picture* picture);
FLUXDEPLOY_API int64_t fluxdeploy_picture_height(const fluxdeploy_picture* picture);
FLUXDEPLOY_API const uint8_t* fluxdeploy_picture_rgb(const fluxdeploy_picture* picture);
/* The file as a mask: where it is not wholly opaque, white for what is transparent, as OpenAI's
 * images API has it; else its pixels. */
FLUXDEPLOY_API const uint8_t* fluxdeploy_picture_mask(const fluxdeploy_picture* picture);
/* SHA-256 of the file, as 64 hex digits. */
FLUXDEPLOY_API const char* fluxdeploy_picture_sha256(const fluxdeploy_picture* picture);

/* A canvas with RGB of 8 bits and margins of so many pixels around it, for outpainting: its pixels
 * are the image to begin from, `fluxdeploy_picture_mask` the mask, and its size, in multiples of
 * 16, that of the picture to make. It has no SHA-256. Since version 2. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_outpaint_canvas(const uint8_t* rgb, int64_t width,
                                                          int64_t height, int64_t left, int64_t top,
                                                          int64_t right, int64_t bottom,
                                                          fluxdeploy_picture** canvas,
                                                          fluxdeploy_error** error);

/* Write RGB in 8 bits to a PNG with text chunks, of which `keys` and `values` have `text_count`.
 * The file is there whole or not at all. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_write_png(const char* path, const uint8_t* rgb,
                                                    int64_t width, int64_t height,
                                                    const char* const* keys,
                                                    const char* const* values, size_t text_count,
                                                    fluxdeploy_error** error);

/* The first `count` normal numbers of a seed, as one tensor: what
 * torch.randn(count, generator=torch.Generator("cpu").manual_seed(seed)) gives. */
FLUXDEPLOY_API fluxdeploy_code fluxdeploy_noise(uint64_t seed, float* values, size_t count,
                                                fluxdeploy_error** error);

#ifdef __cplusplus
} /* extern "C" */
#endif

#if defined(__cplusplus) && !defined(FLUXDEPLOY_NO_CXX)

#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fluxdeploy {
// Inline: a program's own classes of these names, whatever the library was built with.
inline namespace api {

// What every function below raises. `what()` says what failed, what is allowed, what to do.
class Error : public std::runtime_error {
public:
    Error(fluxdeploy_code code, const std::string& message)
        : std::runtime_error(message), code_(code) {}
    fluxdeploy_code code() const noexcept { return code_; }

private:
    fluxdeploy_code code_;
};

namespace detail {

template <auto Free>
struct Freed {
    template <class T>
    void operator()(T* handle) const noexcept {
        Free(handle);
    }
};

template <class T, auto Free>
using Handle = std::unique_ptr<T, Freed<Free>>;

// Raise what a function of C returns.
inline void require(fluxdeploy_code code) {
    if (code != FLUXDEPLOY_OK) throw Error(code, "Memory is at its end.");
}

// Raise what a function of C returns; `call` is given where to put its error.
template <class Call>
void checked(Call call) {
    fluxdeploy_error* error = nullptr;
    const fluxdeploy_code code = call(&error);
    const Handle<fluxdeploy_error, fluxdeploy_error_free> owned(error);
    if (error) throw Error(code, fluxdeploy_error_message(error));
    require(code);
}

template <class T>
T* require(T* made) {
    if (!made) throw Error(FLUXDEPLOY_INTERNAL, "Memory is at its end.");
    return made;
}

}  // namespace detail

// Ends calls from any thread. A copy ends the same calls.
class CancelToken {
public:
    CancelToken() : handle_(detail::require(fluxdeploy_cancel_new()), fluxdeploy_cancel_free) {}
    void cancel() const noexcept { fluxdeploy_cancel_now(handle_.get()); }
    fluxdeploy_cancel* handle() const noexcept { return handle_.get(); }

private:
    std::shared_ptr<fluxdeploy_cancel> handle_;
};

// Token ids of a prompt, padded: CLIP's and T5's.
struct TokenIds {
    std::vector<std::int32_t> clip;
    std::vector<std::int32_t> t5;
};

// Numbers in row-major order: as many as the product of the sizes.
struct Numbers {
    std::vector<std::int64_t> shape;
    std::vector<float> values;
};

// RGB in 8 bits, row by row; `pixels` has width * height * 3 bytes.
struct Image {
    std::int64_t width = 0;
    std::int64_t height = 0;
    std::vector<std::uint8_t> pixels;
};

// What to make; what is empty has the bundle's default. The functions of C say what each means.
struct Request {
    std::vector<std::string> prompts;
    std::vector<std::string> negative_prompts;
    // What T5 reads of them, where that is something else.
    std::vector<std::string> prompts_2;
    std::vector<std::string> negative_prompts_2;
    // In place of the above.
    std::vector<TokenIds> prompt_ids;
    std::vector<TokenIds> negative_prompt_ids;
    // In place of all of them.
    std::optional<Numbers> prompt_embeds;
    std::optional<Numbers> pooled_prompt_embeds;
    std::optional<Numbers> negative_prompt_embeds;
    std::optional<Numbers> negative_pooled_prompt_embeds;
    std::optional<double> true_cfg_scale;
    std::optional<std::int64_t> height;
    std::optional<std::int64_t> width;
    std::optional<std::int64_t> num_inference_steps;
    std::optional<double> guidance_scale;
    std::optional<std::int64_t> num_images_per_prompt;
    std::optional<std::int64_t> max_sequence_length;
    std::optional<std::uint64_t> seed;
    // One for each picture, in place of one for all.
    std::vector<std::uint64_t> seeds;
    std::vector<float> sigmas;
    std::vector<float> latents;
    std::vector<Image> images;
    std::vector<Image> mask_images;
    std::optional<double> strength;
    std::optional<std::int64_t> padding_mask_crop;
    // How many of `images` each picture of a Kontext bundle is drawn after.
    std::optional<std::int64_t> references;
    // Those of a Canny or Depth model, or of the first ControlNet; then of each further one.
    std::vector<Image> control_images;
    std::vector<std::vector<Image>> more_control_images;
    // For ControlNets, one for all or one for each.
    std::vector<std::int64_t> control_mode;
    std::vector<double> controlnet_conditioning_scale;
    std::vector<double> control_guidance_start;
    std::vector<double> control_guidance_end;
    std::optional<std::int64_t> max_area;
    bool auto_resize = true;
    std::optional<std::string> sampler;
    // Steps that are skipped, or whether they are those of the bundle's record.
    std::vector<std::int64_t> skip;
    bool skip_recorded = false;
    // Returns whether to go on. What it throws ends the call, and leaves `generate`.
    std::function<bool(const fluxdeploy_step&)> on_step_end;
    // Whether it is given previews.
    bool preview = false;
    std::optional<CancelToken> cancel;
};

// What was made.
struct Result {
    std::vector<Image> images;
    std::optional<std::uint64_t> seed;
    std::int64_t steps = 0;
    std::vector<std::string> notices;
};

// How to run a bundle.
struct Options {
    std::string runtime = "auto";
    std::optional<std::int64_t> threads;
    std::int64_t device = 0;
    bool low_vram = false;
    // By the runtime's name, the path of its shared library.
    std::vector<std::pair<std::string, std::string>> libraries;
};

// A bundle that pictures are made from. Threads: see the rules at the top.
class Pipeline {
public:
    explicit Pipeline(const std::string& bundle, const Options& options = {}) {
        detail::Handle<fluxdeploy_options, fluxdeploy_options_free> given(
            detail::require(fluxdeploy_options_new()));
        detail::require(fluxdeploy_options_set_runtime(given.get(), options.runtime.c_str()));
        if (options.threads) fluxdeploy_options_set_threads(given.get(), *options.threads);
        fluxdeploy_options_set_device(given.get(), options.device);
        fluxdeploy_options_set_low_vram(given.get(), options.low_vram);
        for (const auto& [runtime, path] : options.libraries) {
            detail::require(
                fluxdeploy_options_set_library(given.get(), runtime.c_str(), path.c_str()));
        }
        fluxdeploy_pipeline* made = nullptr;
        detail::checked([&](fluxdeploy_error** error) {
            return fluxdeploy_pipeline_open(bundle.c_str(), given.get(), &made, error);
        });
        handle_.reset(made);
    }

    // A second pipeline that shares the engines; the two run at the same time.
    Pipeline clone() const {
        fluxdeploy_pipeline* made = nullptr;
        detail::checked([&](fluxdeploy_error** error) {
            return fluxdeploy_pipeline_clone(handle_.get(), &made, error);
        });
        return Pipeline(made);
    }

    // Open the engines now.
    void load() {
        detail::checked([&](fluxdeploy_error** error) {
            return fluxdeploy_pipeline_load(handle_.get(), error);
        });
    }

    // Raise `Error` where a component's engine does not give the golden outputs.
    void check() {
        detail::checked([&](fluxdeploy_error** error) {
            return fluxdeploy_pipeline_check(handle_.get(), nullptr, nullptr, error);
        });
    }

    std::string bundle_hash() const { return fluxdeploy_pipeline_bundle_hash(handle_.get()); }

    // The ids of a prompt, of the tokenizer "clip" or "t5"; a length of 0 is its largest.
    std::vector<std::int32_t> tokenize(const std::string& tokenizer, std::string_view prompt,
                                       std::int64_t length = 0) const {
        std::vector<std::int32_t> ids(4096);
        for (;;) {
            std::size_t count = 0;
            detail::checked([&](fluxdeploy_error** error) {
                return fluxdeploy_pipeline_tokenize(handle_.get(), tokenizer.c_str(), prompt.data(),
                                                    prompt.size(), length, ids.data(), ids.size(),
                                                    &count, error);
            });
            const bool whole = count <= ids.size();
            ids.resize(count);
            if (whole) return ids;
        }
    }

    Result generate(const Request& request) {
        detail::Handle<fluxdeploy_request, fluxdeploy_request_free> given(
            detail::require(fluxdeploy_request_new()));
        Calling calling{&request.on_step_end, nullptr};
        fill(given.get(), request, &calling);
        fluxdeploy_result* made = nullptr;
        try {
            detail::checked([&](fluxdeploy_error** error) {
                return fluxdeploy_pipeline_generate(handle_.get(), given.get(), &made, error);
            });
        } catch (const Error&) {
            if (calling.raised) std::rethrow_exception(calling.raised);
            throw;
        }
        const detail::Handle<fluxdeploy_result, fluxdeploy_result_free> owned(made);
        return read(*made);
    }

    // A picture of one prompt.
    Image generate(const std::string& prompt, std::optional<std::uint64_t> seed = std::nullopt) {
        Request request;
        request.prompts = {prompt};
        request.seed = seed;
        return std::move(generate(request).images.at(0));
    }

    // For the functions of C.
    fluxdeploy_pipeline* handle() const noexcept { return handle_.get(); }

private:
    explicit Pipeline(fluxdeploy_pipeline* handle) : handle_(handle) {}

    struct Calling {
        const std::function<bool(const fluxdeploy_step&)>* function;
        std::exception_ptr raised;
    };

    static int on_step_end(void* user, const fluxdeploy_step* step) noexcept {
        auto* calling = static_cast<Calling*>(user);
        try {
            return (*calling->function)(*step) ? 0 : 1;
        } catch (...) {
            calling->raised = std::current_exception();
            return 1;
        }
    }

    template <class Adder>
    static void add(fluxdeploy_request* given, const Image& image, Adder adder) {
        const bool whole = image.width > 0 && image.height > 0 && image.pixels.size() % 3 == 0 &&
                           image.pixels.size() / 3 / static_cast<std::size_t>(image.width) ==
                               static_cast<std::size_t>(image.height);
        if (!whole) {
            throw Error(FLUXDEPLOY_USAGE,
                        "An image's pixels are not width * height * 3 bytes. Give RGB in 8 bits.");
        }
        detail::require(adder(given, image.pixels.data(), image.width, image.height));
    }

    template <class Setter>
    static void add(fluxdeploy_request* given, const std::optional<Numbers>& numbers,
                    Setter setter) {
        if (!numbers) return;
        std::size_t size = 1;
        for (const std::int64_t axis : numbers->shape) size *= static_cast<std::size_t>(axis);
        if (numbers->values.size() != size) {
            throw Error(FLUXDEPLOY_USAGE,
                        "The numbers are not as many as their shape says. Give them all.");
        }
        detail::require(
            setter(given, numbers->values.data(), numbers->shape.data(), numbers->shape.size()));
    }

    static void fill(fluxdeploy_request* given, const Request& request, Calling* calling) {
        using detail::require;
        for (const auto& text : request.prompts) {
            require(fluxdeploy_request_add_prompt(given, text.data(), text.size()));
        }
        for (const auto& text : request.negative_prompts) {
            require(fluxdeploy_request_add_negative_prompt(given, text.data(), text.size()));
        }
        for (const auto& text : request.prompts_2) {
            require(fluxdeploy_request_add_prompt_2(given, text.data(), text.size()));
        }
        for (const auto& text : request.negative_prompts_2) {
            require(fluxdeploy_request_add_negative_prompt_2(given, text.data(), text.size()));
        }
        add(given, request.prompt_embeds, fluxdeploy_request_set_prompt_embeds);
        add(given, request.pooled_prompt_embeds, fluxdeploy_request_set_pooled_prompt_embeds);
        add(given, request.negative_prompt_embeds, fluxdeploy_request_set_negative_prompt_embeds);
        add(given, request.negative_pooled_prompt_embeds,
            fluxdeploy_request_set_negative_pooled_prompt_embeds);
        for (const auto& ids : request.prompt_ids) {
            require(fluxdeploy_request_add_prompt_ids(given, ids.clip.data(), ids.clip.size(),
                                                      ids.t5.data(), ids.t5.size()));
        }
        for (const auto& ids : request.negative_prompt_ids) {
            require(fluxdeploy_request_add_negative_prompt_ids(
                given, ids.clip.data(), ids.clip.size(), ids.t5.data(), ids.t5.size()));
        }
        const auto set = [given](const auto& value, auto setter) {
            if (value) setter(given, *value);
        };
        set(request.true_cfg_scale, fluxdeploy_request_set_true_cfg_scale);
        set(request.height, fluxdeploy_request_set_height);
        set(request.width, fluxdeploy_request_set_width);
        set(request.num_inference_steps, fluxdeploy_request_set_num_inference_steps);
        set(request.guidance_scale, fluxdeploy_request_set_guidance_scale);
        set(request.num_images_per_prompt, fluxdeploy_request_set_num_images_per_prompt);
        set(request.max_sequence_length, fluxdeploy_request_set_max_sequence_length);
        set(request.seed, fluxdeploy_request_set_seed);
        set(request.strength, fluxdeploy_request_set_strength);
        set(request.padding_mask_crop, fluxdeploy_request_set_padding_mask_crop);
        set(request.references, fluxdeploy_request_set_references);
        set(request.max_area, fluxdeploy_request_set_max_area);
        fluxdeploy_request_set_auto_resize(given, request.auto_resize);
        if (request.sampler) {
            require(fluxdeploy_request_set_sampler(given, request.sampler->c_str()));
        }
        require(fluxdeploy_request_set_seeds(given, request.seeds.data(), request.seeds.size()));
        require(fluxdeploy_request_set_sigmas(given, request.sigmas.data(), request.sigmas.size()));
        require(fluxdeploy_request_set_skip(given, request.skip.data(), request.skip.size()));
        fluxdeploy_request_set_skip_recorded(given, request.skip_recorded);
        if (!request.latents.empty()) {
            require(fluxdeploy_request_set_latents(given, request.latents.data(),
                                                   request.latents.size()));
        }
        for (const auto& image : request.images) {
            add(given, image, fluxdeploy_request_add_image);
        }
        for (const auto& mask : request.mask_images) {
            add(given, mask, fluxdeploy_request_add_mask_image);
        }
        for (const auto& control : request.control_images) {
            add(given, control, fluxdeploy_request_add_control_image);
        }
        for (std::size_t place = 0; place < request.more_control_images.size(); ++place) {
            const auto number = static_cast<std::int64_t>(place) + 1;
            const auto adder = [number](auto* to, const auto* rgb, auto width, auto height) {
                return fluxdeploy_request_add_controlnet_image(to, number, rgb, width, height);
            };
            for (const auto& control : request.more_control_images[place]) {
                add(given, control, adder);
            }
        }
        const auto set_each = [given](const auto& values, auto setter) {
            require(setter(given, values.data(), values.size()));
        };
        set_each(request.control_mode, fluxdeploy_request_set_control_mode);
        set_each(request.controlnet_conditioning_scale,
                 fluxdeploy_request_set_controlnet_conditioning_scale);
        set_each(request.control_guidance_start, fluxdeploy_request_set_control_guidance_start);
        set_each(request.control_guidance_end, fluxdeploy_request_set_control_guidance_end);
        if (request.on_step_end) {
            require(fluxdeploy_request_set_callback(given, &on_step_end, calling));
        }
        fluxdeploy_request_set_preview(given, request.preview);
        if (request.cancel) fluxdeploy_request_set_cancel(given, request.cancel->handle());
    }

    static Result read(const fluxdeploy_result& made) {
        Result result;
        const std::int64_t width = fluxdeploy_result_width(&made);
        const std::int64_t height = fluxdeploy_result_height(&made);
        for (std::int64_t index = 0; index < fluxdeploy_result_count(&made); ++index) {
            const std::uint8_t* pixels = fluxdeploy_result_pixels(&made, index);
            result.images.push_back({width, height, {pixels, pixels + width * height * 3}});
        }
        if (fluxdeploy_result_has_seed(&made)) result.seed = fluxdeploy_result_seed(&made);
        result.steps = fluxdeploy_result_steps(&made);
        for (std::size_t index = 0; const char* text = fluxdeploy_result_notice(&made, index);
             ++index) {
            result.notices.emplace_back(text);
        }
        return result;
    }

    detail::Handle<fluxdeploy_pipeline, fluxdeploy_pipeline_free> handle_;
};

// The picture in a PNG.
inline Image read_png(const std::string& path) {
    fluxdeploy_picture* made = nullptr;
    detail::checked([&](fluxdeploy_error** error) {
        return fluxdeploy_picture_read(path.c_str(), &made, error);
    });
    const detail::Handle<fluxdeploy_picture, fluxdeploy_picture_free> owned(made);
    const std::int64_t width = fluxdeploy_picture_width(made);
    const std::int64_t height = fluxdeploy_picture_height(made);
    const std::uint8_t* rgb = fluxdeploy_picture_rgb(made);
    return {width, height, {rgb, rgb + width * height * 3}};
}

// An image with margins of so many pixels around it, and the mask to draw these with.
inline std::pair<Image, Image> outpaint_canvas(const Image& image, std::int64_t left,
                                               std::int64_t top, std::int64_t right,
                                               std::int64_t bottom) {
    fluxdeploy_picture* made = nullptr;
    detail::checked([&](fluxdeploy_error** error) {
        return fluxdeploy_outpaint_canvas(image.pixels.data(), image.width, image.height, left, top,
                                          right, bottom, &made, error);
    });
    const detail::Handle<fluxdeploy_picture, fluxdeploy_picture_free> owned(made);
    const std::int64_t width = fluxdeploy_picture_width(made);
    const std::int64_t height = fluxdeploy_picture_height(made);
    const auto copied = [&](const std::uint8_t* rgb) {
        return Image{width, height, {rgb, rgb + width * height * 3}};
    };
    return {copied(fluxdeploy_picture_rgb(made)), copied(fluxdeploy_picture_mask(made))};
}

// Write a PNG with text chunks, keyword and text each.
inline void write_png(const std::string& path, const Image& image,
                      const std::vector<std::pair<std::string, std::string>>& text = {}) {
    std::vector<const char*> keys, values;
    for (const auto& [key, value] : text) {
        keys.push_back(key.c_str());
        values.push_back(value.c_str());
    }
    detail::checked([&](fluxdeploy_error** error) {
        return fluxdeploy_write_png(path.c_str(), image.pixels.data(), image.width, image.height,
                                    keys.data(), values.data(), text.size(), error);
    });
}

}  // namespace api
}  // namespace fluxdeploy

#endif /* __cplusplus */
#endif /* FLUXDEPLOY_FLUXDEPLOY_H */
