#include "files/manifest.hpp"

#include <algorithm>

#include "errors.hpp"
#include "files/boundary.hpp"
#include "files/disk.hpp"
#include "files/fields.hpp"
#include "files/manifest_checks.hpp"
#include "files/recipe.hpp"
#include "files/utf8.hpp"
#include "files/words.hpp"

namespace fluxdeploy {
namespace {

// Bytes of the file. A full-size model's has some 30 KiB.
constexpr std::int64_t kMaxManifest = 4 << 20;
constexpr std::size_t kMaxValues = 100'000;
constexpr std::size_t kMaxEditions = 64;
constexpr const char* kRebuild = " Build the bundle again with `fluxdeploy build`.";

Dimension read_dimension(const Json& json, const std::string& where) {
    if (const auto* size = json.as<std::int64_t>()) return *size;
    if (const auto* symbol = json.as<std::string>()) return *symbol;
    throw FieldError(where, "must be an integer or a string, not " + shortened(json.text()));
}

TensorSpec read_tensor(const Json& json, const std::string& where) {
    const Fields fields(json, where, {"name", "dtype", "shape"});
    return {fields.text("name"), fields.text("dtype"), fields.list("shape", read_dimension)};
}

FileRecord read_file(const Json& json, const std::string& where) {
    const Fields fields(json, where, {"path", "size", "sha256"});
    return {fields.text("path"), fields.integer("size"), fields.text("sha256")};
}

DimensionRange read_range(const Json& json, const std::string& where) {
    const Fields fields(json, where, {"min", "opt", "max"});
    return {fields.integer("min"), fields.integer("opt"), fields.integer("max")};
}

EngineRecord read_engine(const Json& json, const std::string& where) {
    const Fields fields(json, where,
                        {"runtime", "runtime_version", "target", "path", "dimensions"});
    return {fields.text("runtime"), fields.text("runtime_version"), fields.text("target"),
            fields.text("path"), fields.mapping("dimensions", read_range)};
}

// Whether there is an object, and not null.
bool has_object(const Json& json, const std::string& where) {
    if (json.as<std::nullptr_t>()) return false;
    if (!json.as<Json::Object>()) {
        throw FieldError(where, "must be an object or null, not " + shortened(json.text()));
    }
    return true;
}

std::optional<GoldenRecord> read_golden(const Json& json, const std::string& where) {
    if (!has_object(json, where)) return std::nullopt;
    const Fields fields(json, where, {"path", "max_error", "min_cosine"});
    return GoldenRecord{fields.text("path"), fields.number("max_error"),
                        fields.number("min_cosine")};
}

ComponentRecord read_component(const Json& json, const std::string& where) {
    const Fields fields(json, where,
                        {"key", "precision", "compute", "inputs", "outputs", "files", "engines",
                         "golden", "recipe"});
    ComponentRecord component;
    component.key = fields.text("key");
    component.precision = fields.text("precision");
    component.compute = fields.text("compute");
    component.inputs = fields.list("inputs", read_tensor);
    component.outputs = fields.list("outputs", read_tensor);
    component.files = fields.list("files", read_file);
    component.engines = fields.list("engines", read_engine);
    component.golden = read_golden(fields.get("golden"), fields.where("golden"));
    check_recipe(fields.get("recipe"), fields.where("recipe"));
    return component;
}

LatentSpec read_latents(const Json& json, const std::string& where) {
    const Fields fields(
        json, where,
        {"channels", "patch_size", "spatial_factor", "scaling_factor", "shift_factor"});
    return {fields.integer("channels"), fields.integer("patch_size"),
            fields.integer("spatial_factor"), fields.number("scaling_factor"),
            fields.number("shift_factor")};
}

RopeSpec read_rope(const Json& json, const std::string& where) {
    const Fields fields(json, where, {"axes_dims", "theta"});
    return {fields.list("axes_dims", as_integer), fields.number("theta")};
}

ScheduleSpec read_schedule(const Json& json, const std::string& where) {
    const Fields fields(json, where,
                        {"shift", "use_dynamic_shifting", "time_shift_type", "base_shift",
                         "max_shift", "base_image_seq_len", "max_image_seq_len", "shift_terminal"},
                        {"spacing"});
    ScheduleSpec schedule;
    schedule.shift = fields.number("shift");
    schedule.use_dynamic_shifting = fields.boolean("use_dynamic_shifting");
    schedule.time_shift_type = fields.text("time_shift_type");
    schedule.base_shift = fields.number("base_shift");
    schedule.max_shift = fields.number("max_shift");
    schedule.base_image_seq_len = fields.integer("base_image_seq_len");
    schedule.max_image_seq_len = fields.integer("max_image_seq_len");
    schedule.shift_terminal = fields.optional_number("shift_terminal");
    if (fields.has("spacing")) schedule.spacing = fields.optional_text("spacing");
    return schedule;
}

TokenizerRecord read_tokenizer(const Json& json, const std::string& where) {
    const Fields fields(json, where,
                        {"path", "max_length", "pad_id", "prefix", "suffix", "padding_side",
                         "truncation_side", "files"});
    TokenizerRecord tokenizer;
    tokenizer.path = fields.text("path");
    tokenizer.max_length = fields.integer("max_length");
    tokenizer.pad_id = fields.integer("pad_id");
    tokenizer.prefix = fields.list("prefix", as_integer);
    tokenizer.suffix = fields.list("suffix", as_integer);
    tokenizer.padding_side = fields.text("padding_side");
    tokenizer.truncation_side = fields.text("truncation_side");
    tokenizer.files = fields.list("files", read_file);
    return tokenizer;
}

Defaults read_defaults(const Json& json, const std::string& where) {
    const Fields fields(json, where,
                        {"height", "width", "num_inference_steps", "guidance_scale",
                         "max_sequence_length", "strength"});
    return {fields.integer("height"),
            fields.integer("width"),
            fields.integer("num_inference_steps"),
            fields.number("guidance_scale"),
            fields.integer("max_sequence_length"),
            fields.number("strength")};
}

QualityRecord read_quality(const Json& json, const std::string& where) {
    const Fields fields(json, where, {"min_psnr", "min_ssim", "min_sqnr"});
    return {fields.number("min_psnr"), fields.number("min_ssim"),
            fields.optional_number("min_sqnr")};
}

SkipRecord read_skips(const Json& json, const std::string& where) {
    const Fields fields(json, where,
                        {"sampler", "num_inference_steps", "steps", "order", "height", "width",
                         "min_psnr", "psnr", "pictures"});
    SkipRecord record;
    record.sampler = fields.text("sampler");
    record.num_inference_steps = fields.integer("num_inference_steps");
    record.steps = fields.list("steps", as_integer);
    record.order = fields.integer("order");
    record.height = fields.integer("height");
    record.width = fields.integer("width");
    record.min_psnr = fields.number("min_psnr");
    record.psnr = fields.number("psnr");
    record.pictures = fields.integer("pictures");
    return record;
}

std::vector<double> read_numbers(const Json& json, const std::string& where) {
    std::vector<double> numbers;
    const auto& entries = as_list(json, where);
    for (std::size_t i = 0; i < entries.size(); ++i) {
        numbers.push_back(as_number(entries[i], at(where, i)));
    }
    return numbers;
}

std::optional<PreviewSpec> read_preview(const Json& json, const std::string& where) {
    if (!has_object(json, where)) return std::nullopt;
    const Fields fields(json, where, {"matrix", "bias"});
    return PreviewSpec{fields.list("matrix", read_numbers), fields.list("bias", as_number)};
}

ControlNetRecord read_controlnet(const Json& json, const std::string& where) {
    const Fields fields(json, where, {"component", "modes"});
    return {fields.text("component"), fields.integer("modes")};
}

// What can be bytes of a pixel, under the names of the VAE's halves.
std::map<std::string, std::int64_t> read_vae_bytes(const Json& provenance) {
    constexpr std::int64_t most = std::int64_t{1} << 40;
    std::map<std::string, std::int64_t> found;
    const Json* recorded = provenance.find("vae_bytes_per_pixel");
    if (recorded == nullptr) return found;
    for (const char* name : {"vae_decoder", "vae_encoder"}) {
        const Json* entry = recorded->find(name);
        const auto* cost = entry ? entry->as<std::int64_t>() : nullptr;
        if (cost && 0 < *cost && *cost <= most) found[name] = *cost;
    }
    return found;
}

std::string copied_text(const Json& json, const std::string& where) { return as_text(json, where); }

// What each edition has of its own.
void read_own(Manifest& manifest, const Fields& fields) {
    manifest.components = fields.mapping("components", read_component);
    manifest.defaults = read_defaults(fields.get("defaults"), fields.where("defaults"));
    manifest.quality = read_quality(fields.get("quality"), fields.where("quality"));
    as_object(fields.get("provenance"), fields.where("provenance"));
    manifest.vae_bytes_per_pixel = read_vae_bytes(fields.get("provenance"));
    manifest.skips.clear();
    if (fields.has("skips")) manifest.skips = fields.list("skips", read_skips);
}

std::vector<Manifest> read_editions(const Manifest& first, const Json& json) {
    const auto& entries = as_list(json, "editions");
    require(entries.size() <= kMaxEditions, "editions",
            "has " + std::to_string(entries.size()) + " entries; " +
                std::to_string(kMaxEditions) + " are the most");
    std::vector<Manifest> editions;
    for (std::size_t i = 0; i < entries.size(); ++i) {
        const Fields own(entries[i], at("editions", i),
                         {"components", "defaults", "quality", "provenance"}, {"skips"});
        editions.push_back(first);
        read_own(editions.back(), own);
    }
    return editions;
}

Manifest read_fields(const Json& json) {
    const Fields fields(
        json, "",
        {"schema_version", "family", "variant", "guidance_embedding", "components", "latents",
         "rope", "schedule", "tokenizers", "defaults", "quality", "provenance"},
        {"skips", "tasks", "preview", "controlnets", "redux", "ip_adapter", "editions"});
    Manifest manifest;
    manifest.schema_version = fields.integer("schema_version");
    manifest.family = fields.text("family");
    manifest.variant = fields.text("variant");
    manifest.guidance_embedding = fields.boolean("guidance_embedding");
    manifest.latents = read_latents(fields.get("latents"), "latents");
    manifest.rope = read_rope(fields.get("rope"), "rope");
    manifest.schedule = read_schedule(fields.get("schedule"), "schedule");
    manifest.tokenizers = fields.mapping("tokenizers", read_tokenizer);
    read_own(manifest, fields);
    if (fields.has("tasks")) manifest.tasks = fields.list("tasks", copied_text);
    if (fields.has("preview")) {
        manifest.preview = read_preview(fields.get("preview"), fields.where("preview"));
    }
    if (fields.has("controlnets")) {
        manifest.controlnets = fields.list("controlnets", read_controlnet);
    }
    // What this library draws, from words and along pictures of other kinds, takes none of these.
    for (const char* name : {"redux", "ip_adapter"}) {
        if (fields.has(name)) has_object(fields.get(name), fields.where(name));
    }
    if (fields.has("editions")) {
        manifest.editions = read_editions(manifest, fields.get("editions"));
    }
    return manifest;
}

void check_version(const Json& json, const std::string& source) {
    const Json* found = json.find("schema_version");
    const auto* version = found ? found->as<std::int64_t>() : nullptr;
    if (!version || *version == kSchemaVersion) return;
    const char* remedy = *version > kSchemaVersion
                             ? "upgrade fluxdeploy, or build the bundle again with this version"
                             : "build the bundle again with `fluxdeploy build`";
    throw Error(ErrorCode::bundle, source + " has schema version " + std::to_string(*version) +
                                       ", and this program reads version " +
                                       std::to_string(kSchemaVersion) + ": " + remedy + ".");
}

}  // namespace

std::int64_t LatentSpec::channels_read(const std::string& task) const {
    // A mask keeps each pixel.
    if (task == "fill") return 2 * token_channels() + token_side() * token_side();
    return token_channels() * (task == "control" ? 2 : 1);
}

bool Manifest::does(const std::string& task) const {
    return std::find(tasks.begin(), tasks.end(), task) != tasks.end();
}

const std::string& Manifest::runtime() const {
    return components.at("transformer").engines.front().runtime;
}

std::map<std::string, FileRecord> Manifest::files() const {
    std::map<std::string, FileRecord> result;
    for (const Manifest& edition : editions) result.merge(edition.files());
    for (const auto& owner : components) {
        for (const auto& record : owner.second.files) result.emplace(record.path, record);
    }
    for (const auto& owner : tokenizers) {
        for (const auto& record : owner.second.files) result.emplace(record.path, record);
    }
    return result;
}

Manifest parse_manifest(const std::string& text, const std::string& source) {
    if (!try_decode_utf8(text)) {
        throw Error(ErrorCode::bundle, source + " is not UTF-8 text." + kRebuild);
    }
    try {
        const Json json = parse_json(text, kMaxValues);
        check_version(json, source);
        check_text(json, "", 0);
        Manifest manifest = read_fields(json);
        check_manifest(manifest);
        return manifest;
    } catch (const JsonError& error) {
        throw Error(ErrorCode::bundle,
                    source + " is not valid JSON: " + error.what() + "." + kRebuild);
    } catch (const FieldError& error) {
        throw Error(ErrorCode::bundle, source + ": " + error.what() + "." + kRebuild);
    }
}

Manifest read_manifest(const std::filesystem::path& bundle) {
    const std::filesystem::path path = bundle / kManifestName;
    return parse_manifest(read_manifest_text(bundle), path.string());
}

std::string read_manifest_text(const std::filesystem::path& bundle) {
    const std::filesystem::path path = bundle / kManifestName;
    try {
        return read_whole(path, kMaxManifest);
    } catch (const DiskError& error) {
        if (!error.is_missing()) cannot_read(path, error);
    }
    throw Error(ErrorCode::bundle,
                "There is no bundle at " + bundle.string() + ": it has no " + kManifestName +
                    ". Make one with `fluxdeploy build`, or name another folder.");
}

std::optional<std::string> missing_component(const Manifest& manifest) {
    for (const char* name : kNeededComponents) {
        if (manifest.components.count(name) == 0) return name;
    }
    return std::nullopt;
}

}  // namespace fluxdeploy
