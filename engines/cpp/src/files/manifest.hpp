// The manifest: all that a host must know of a bundle. docs/bundle.md describes the fields.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace fluxdeploy {

inline constexpr std::int64_t kSchemaVersion = 4;
inline constexpr const char* kManifestName = "fluxdeploy.json";

// A fixed size, or the symbol of a dynamic one, such as "B".
using Dimension = std::variant<std::int64_t, std::string>;

// A tensor at an engine's boundary. `dtype` is "float32" or "int32".
struct TensorSpec {
    std::string name;
    std::string dtype;
    std::vector<Dimension> shape;
};

// A file of the bundle: `path` is relative to the bundle, with forward slashes.
struct FileRecord {
    std::string path;
    std::int64_t size = 0;
    std::string sha256;
};

// The sizes that an engine accepts for one symbol; `opt` is the one it is tuned for.
struct DimensionRange {
    std::int64_t min = 0;
    std::int64_t opt = 0;
    std::int64_t max = 0;
};

// One engine of a component: `path` is what the runtime opens, one of the recorded files.
struct EngineRecord {
    std::string runtime;
    std::string runtime_version;
    std::string target;
    std::string path;
    std::map<std::string, DimensionRange> dimensions;
};

// Known inputs and outputs of a component, and how far an engine's outputs may be off.
struct GoldenRecord {
    std::string path;
    double max_error = 0;
    double min_cosine = 0;
};

// One component. Its `recipe` is checked and not kept: it is for people and for the next build.
struct ComponentRecord {
    std::string key;
    std::string precision;
    std::string compute;
    std::vector<TensorSpec> inputs;
    std::vector<TensorSpec> outputs;
    std::vector<FileRecord> files;
    std::vector<EngineRecord> engines;
    std::optional<GoldenRecord> golden;
};

// x_model = (z_vae - shift_factor) * scaling_factor.
struct LatentSpec {
    std::int64_t channels = 0;
    std::int64_t patch_size = 0;
    std::int64_t spatial_factor = 0;
    double scaling_factor = 0;
    double shift_factor = 0;

    // Pixels of an image token's side.
    std::int64_t token_side() const { return spatial_factor * patch_size; }

    // Of a token of latents, and of its velocity.
    std::int64_t token_channels() const { return channels * patch_size * patch_size; }

    // Of a token of `hidden_states`, where the transformer is one for a task.
    std::int64_t channels_read(const std::string& task) const;
};

// Rotary embedding: channels of a head for each number of a token's id.
struct RopeSpec {
    std::vector<std::int64_t> axes_dims;
    double theta = 0;
};

// The constants of the noise levels. `time_shift_type` is "exponential" or "linear"; `spacing` is
// "karras", "exponential", "beta" or none.
struct ScheduleSpec {
    double shift = 0;
    bool use_dynamic_shifting = false;
    std::string time_shift_type;
    double base_shift = 0;
    double max_shift = 0;
    std::int64_t base_image_seq_len = 0;
    std::int64_t max_image_seq_len = 0;
    std::optional<double> shift_terminal;
    std::optional<std::string> spacing;
};

// What a tokenizer's file gives for a prompt, and what is done with it. A side is "left" or
// "right".
struct TokenizerRecord {
    std::string path;
    std::int64_t max_length = 0;
    std::int64_t pad_id = 0;
    std::vector<std::int64_t> prefix;
    std::vector<std::int64_t> suffix;
    std::string padding_side;
    std::string truncation_side;
    std::vector<FileRecord> files;
};

// What a host uses where the caller says nothing.
struct Defaults {
    std::int64_t height = 0;
    std::int64_t width = 0;
    std::int64_t num_inference_steps = 0;
    double guidance_scale = 0;
    std::int64_t max_sequence_length = 0;
    double strength = 0;
};

// How near the bundle's pictures must come to PyTorch's.
struct QualityRecord {
    double min_psnr = 0;
    double min_ssim = 0;
    std::optional<double> min_sqnr;
};

// Steps in which the velocity is extrapolated, by a polynomial of this order, for calls with this
// sampler and so many steps; and what pictures then keep, in dB, at this size.
struct SkipRecord {
    std::string sampler;
    std::int64_t num_inference_steps = 0;
    std::vector<std::int64_t> steps;
    std::int64_t order = 0;
    std::int64_t height = 0;
    std::int64_t width = 0;
    double min_psnr = 0;
    double psnr = 0;
    std::int64_t pictures = 0;
};

// Cheap pictures of latents: r, g, b = x * matrix + bias, with a row of the matrix for each
// channel.
struct PreviewSpec {
    std::vector<std::vector<double>> matrix;
    std::vector<double> bias;
};

// A ControlNet: the component that runs it in each step, and how many kinds of control it tells
// apart by a number; 0 where it knows one alone.
struct ControlNetRecord {
    std::string component;
    std::int64_t modes = 0;

    // What runs once a picture, and what makes tokens of pixels, where there is one.
    std::string conditioner() const { return component + "_conditioner"; }
    std::string encoder() const { return component + "_encoder"; }
};

// A whole bundle. Of `provenance`, which is for people and may hold anything, the memory that the
// VAE takes is kept.
struct Manifest {
    std::int64_t schema_version = 0;
    std::string family;
    std::string variant;
    bool guidance_embedding = false;
    std::map<std::string, ComponentRecord> components;
    LatentSpec latents;
    RopeSpec rope;
    ScheduleSpec schedule;
    std::map<std::string, TokenizerRecord> tokenizers;
    Defaults defaults;
    QualityRecord quality;
    std::vector<SkipRecord> skips;
    std::optional<PreviewSpec> preview;
    // What its transformer was trained for.
    std::vector<std::string> tasks = {"text to image", "image to image", "inpainting"};
    std::vector<ControlNetRecord> controlnets;
    // Bytes a pixel that `vae_decoder` and `vae_encoder` take on a CPU, where that is recorded.
    std::map<std::string, std::int64_t> vae_bytes_per_pixel;
    // What the bundle has for other runtimes, each as the manifest of a bundle that has no more.
    std::vector<Manifest> editions;

    // What the components are for; another runtime may have some of them beside it.
    const std::string& runtime() const;

    bool does(const std::string& task) const;

    // Every file record by its path, also of other editions; records of one path are equal.
    std::map<std::string, FileRecord> files() const;
};

// The manifest that `text` holds; `source` names it in errors. Raises `Error` (bundle), with the
// place in the JSON, for anything that a manifest of this version cannot hold, and for records
// that contradict each other.
Manifest parse_manifest(const std::string& text, const std::string& source);

// The manifest of the bundle at `bundle`. Raises `Error` (bundle) where there is none, or as
// `parse_manifest` does. No other file is looked at: see `open_bundle`.
Manifest read_manifest(const std::filesystem::path& bundle);

// The text of that manifest, as `parse_manifest` takes it. Raises `Error` (bundle) where there is
// none.
std::string read_manifest_text(const std::filesystem::path& bundle);

// The first component that a picture takes and the bundle has not, if any.
std::optional<std::string> missing_component(const Manifest& manifest);

// Why `path` cannot name a file of a bundle, or an empty text where it can. Such paths are
// relative to the bundle, with forward slashes, and never leave it on any system.
std::string path_problem(const std::string& path);

}  // namespace fluxdeploy
