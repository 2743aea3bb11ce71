#include "files/manifest_checks.hpp"

#include <algorithm>
#include <cmath>
#include <set>

#include "files/boundary.hpp"
#include "files/fields.hpp"
#include "files/utf8.hpp"
#include "files/words.hpp"

namespace fluxdeploy {
namespace {

constexpr int kMaxDepth = 32;
// Bytes of a file's name, and characters of a path below a bundle, whose own comes before it.
constexpr std::size_t kMaxName = 255, kMaxPath = 1024;
// A float32 has about this many between its largest and its smallest digit.
constexpr double kMaxDecibels = 150;
// Of what an engine may take: runtimes count in 32 bits.
constexpr std::int64_t kMaxSize = INT32_MAX;
constexpr std::int64_t kMaxElements = INT32_MAX;
// No constant of a model is larger, nor, where it is divided by, smaller than one in so many.
constexpr double kLarge = 1e6;
// A float32 holds e to this power, and its inverse.
constexpr double kMaxExponent = 80;
constexpr std::int64_t kMaxTokens = 1 << 16;
constexpr std::int64_t kMaxAxis = 4096;
constexpr std::size_t kMaxEntries = 64;
constexpr std::size_t kMaxFiles = 4096;
constexpr std::int64_t kMaxSide = 1 << 16, kMaxSteps = 10'000;
// Of the extrapolation of a velocity: a parabola.
constexpr std::int64_t kMaxOrder = 2;
constexpr std::int64_t kMaxModes = 1000;
constexpr const char* kSpacings[] = {"beta", "exponential", "karras"};
constexpr const char* kTasks[] = {"text to image", "image to image", "inpainting", "fill",
                                  "control",       "kontext",        "controlnet"};
constexpr std::string_view kSymbols[] = {"B", "S", "L", "T", "V",
                                          "N", "H", "W", "h", "w"};

std::string text(std::int64_t value) { return std::to_string(value); }

// Control characters, ends of lines, and marks of the direction of writing.
bool is_hidden(char32_t code) {
    return code < 0x20 || (code >= 0x7F && code < 0xA0) || code == 0x61C || code == 0x200E ||
           code == 0x200F || (code >= 0x2028 && code <= 0x202E) ||
           (code >= 0x2066 && code <= 0x2069);
}

bool has_hidden(const std::string& given) {
    const auto codes = decode_utf8(given);
    return std::any_of(codes.begin(), codes.end(), is_hidden);
}

std::vector<std::string> split(const std::string& path) {
    std::vector<std::string> parts(1);
    for (const char byte : path) {
        if (byte == '/') {
            parts.emplace_back();
        } else {
            parts.back() += byte;
        }
    }
    return parts;
}

template <class Names>
std::string listed(const Names& names) {
    std::string result;
    for (const auto& name : std::set<std::string>(std::begin(names), std::end(names))) {
        result += (result.empty() ? "" : ", ") + name;
    }
    return result.empty() ? "none" : result;
}

std::string listed_sizes(const std::vector<std::int64_t>& sizes) {
    std::string result = "[";
    for (const std::int64_t size : sizes) result += (result.size() > 1 ? ", " : "") + text(size);
    return result + "]";
}

void check_range(const std::string& where, double value, double least, double most) {
    require(
        least <= value && value <= most, where,
        "is " + rounded(value) + "; it must be from " + rounded(least) + " to " + rounded(most));
}

void check_count(std::size_t count, const std::string& where) {
    require(count <= kMaxEntries, where,
            "has " + std::to_string(count) + " entries; " + std::to_string(kMaxEntries) +
                " are the most");
}

// Refuse lists that would take long to check, before they are.
void check_counts(const Manifest& manifest) {
    check_count(manifest.components.size(), "components");
    check_count(manifest.tokenizers.size(), "tokenizers");
    check_count(manifest.rope.axes_dims.size(), "rope.axes_dims");
    check_count(manifest.skips.size(), "skips");
    check_count(manifest.tasks.size(), "tasks");
    check_count(manifest.controlnets.size(), "controlnets");
    std::size_t files = 0;
    for (const Manifest& edition : manifest.editions) {
        for (const auto& [name, component] : edition.components) files += component.files.size();
    }
    for (const auto& [name, component] : manifest.components) {
        const std::string where = join("components", name);
        for (const auto& [side, specs] :
             {std::pair{"inputs", &component.inputs}, {"outputs", &component.outputs}}) {
            check_count(specs->size(), join(where, side));
            for (std::size_t i = 0; i < specs->size(); ++i) {
                check_count((*specs)[i].shape.size(), join(at(join(where, side), i), "shape"));
            }
        }
        check_count(component.engines.size(), join(where, "engines"));
        files += component.files.size();
    }
    for (const auto& [name, tokenizer] : manifest.tokenizers) {
        check_count(tokenizer.prefix.size(), join(join("tokenizers", name), "prefix"));
        check_count(tokenizer.suffix.size(), join(join("tokenizers", name), "suffix"));
        files += tokenizer.files.size();
    }
    require(files <= kMaxFiles, "",
            "It names " + std::to_string(files) + " files; " + std::to_string(kMaxFiles) +
                " are the most");
}

using KnownFiles = std::map<std::string, const FileRecord*>;

void check_file(const FileRecord& record, const std::string& where, KnownFiles& known) {
    const std::string problem = path_problem(record.path);
    require(problem.empty(), join(where, "path"),
            "is " + in_quotes(record.path) + ", which " + problem);
    require(record.path != kManifestName, join(where, "path"), "is the manifest itself");
    require(record.size >= 0, join(where, "size"),
            "is " + text(record.size) + "; sizes are not negative");
    const bool is_hash = record.sha256.size() == 64 &&
                         record.sha256.find_first_not_of("0123456789abcdef") == std::string::npos;
    require(is_hash, join(where, "sha256"), "must be 64 lower-case hexadecimal digits");
    const FileRecord& first = *known.emplace(record.path, &record).first->second;
    require(first.size == record.size && first.sha256 == record.sha256, where,
            "gives " + in_quotes(record.path) + " another size or hash than an earlier record");
}

void check_files_of(const std::vector<FileRecord>& records, const std::string& where,
                    KnownFiles& known) {
    for (std::size_t i = 0; i < records.size(); ++i) {
        check_file(records[i], at(join(where, "files"), i), known);
    }
}

std::set<std::string> paths_of(const std::vector<FileRecord>& records) {
    std::set<std::string> paths;
    for (const auto& record : records) paths.insert(record.path);
    return paths;
}

bool is_symbol(const std::string& name) {
    return std::find(std::begin(kSymbols), std::end(kSymbols), name) != std::end(kSymbols);
}

void check_tensor(const TensorSpec& spec, const std::string& where,
                  std::set<std::string>& symbols) {
    require(spec.dtype == "float32" || spec.dtype == "int32", join(where, "dtype"),
            "is " + in_quotes(spec.dtype) + "; tensors are float32 or int32");
    std::int64_t elements = 1;
    for (std::size_t i = 0; i < spec.shape.size(); ++i) {
        const auto* symbol = std::get_if<std::string>(&spec.shape[i]);
        const auto* size = std::get_if<std::int64_t>(&spec.shape[i]);
        require(symbol ? is_symbol(*symbol) : 1 <= *size && *size <= kMaxSize,
                at(join(where, "shape"), i),
                "is " + (symbol ? in_quotes(*symbol) : text(*size)) +
                    "; it must be a size from 1 to " + text(kMaxSize) + " or one of " +
                    listed(kSymbols));
        if (symbol) {
            symbols.insert(*symbol);
        } else {
            // Both factors have 31 bits: the product cannot overflow.
            elements *= *size;
            require(elements <= kMaxElements, join(where, "shape"),
                    "has more than " + text(kMaxElements) + " elements");
        }
    }
}

void check_engine(const EngineRecord& engine, const std::string& where,
                  const std::set<std::string>& paths, const std::set<std::string>& symbols) {
    require(paths.count(engine.path) > 0, join(where, "path"),
            "is " + in_quotes(engine.path) + ", which is not among the component's files");
    std::set<std::string> given;
    for (const auto& dimension : engine.dimensions) given.insert(dimension.first);
    require(given == symbols, join(where, "dimensions"),
            "must have exactly the symbols of the component's tensors: " + listed(symbols) +
                ", not " + listed(given));
    for (const auto& [symbol, sizes] : engine.dimensions) {
        require(1 <= sizes.min && sizes.min <= sizes.opt && sizes.opt <= sizes.max &&
                    sizes.max <= kMaxSize,
                join(join(where, "dimensions"), symbol),
                "must have 1 <= min <= opt <= max <= " + text(kMaxSize) + ", not " +
                    text(sizes.min) + ", " + text(sizes.opt) + ", " + text(sizes.max));
    }
}

void check_golden(const GoldenRecord& golden, const std::string& where,
                  const std::set<std::string>& paths) {
    require(paths.count(golden.path) > 0, join(where, "path"),
            "is " + in_quotes(golden.path) + ", which is not among the component's files");
    require(golden.max_error >= 0, join(where, "max_error"), "is negative");
    require(-1 <= golden.min_cosine && golden.min_cosine <= 1, join(where, "min_cosine"),
            "is not between -1 and 1");
}

void check_component(const ComponentRecord& component, const std::string& where) {
    const auto paths = paths_of(component.files);
    std::set<std::string> symbols;
    for (const auto& [side, specs] :
         {std::pair{"inputs", &component.inputs}, {"outputs", &component.outputs}}) {
        std::set<std::string> names;
        for (const auto& spec : *specs) names.insert(spec.name);
        require(names.size() == specs->size(), join(where, side), "names a tensor twice");
        for (std::size_t i = 0; i < specs->size(); ++i) {
            check_tensor((*specs)[i], at(join(where, side), i), symbols);
        }
    }
    require(!component.engines.empty(), join(where, "engines"), "is empty; nothing can run it");
    for (std::size_t i = 0; i < component.engines.size(); ++i) {
        check_engine(component.engines[i], at(join(where, "engines"), i), paths, symbols);
    }
    if (component.golden) check_golden(*component.golden, join(where, "golden"), paths);
}

void check_id(std::int64_t id, const std::string& where) {
    require(0 <= id && id <= INT32_MAX, where,
            "is " + text(id) + "; ids are from 0 to " + text(INT32_MAX));
}

void check_tokenizer(const TokenizerRecord& tokenizer, const std::string& where) {
    require(paths_of(tokenizer.files).count(tokenizer.path) > 0, join(where, "path"),
            "is " + in_quotes(tokenizer.path) + ", which is not among the tokenizer's files");
    check_id(tokenizer.pad_id, join(where, "pad_id"));
    for (const auto& [name, ids] :
         {std::pair{"prefix", &tokenizer.prefix}, {"suffix", &tokenizer.suffix}}) {
        for (std::size_t i = 0; i < ids->size(); ++i) {
            check_id((*ids)[i], at(join(where, name), i));
        }
    }
    const auto around =
        static_cast<std::int64_t>(tokenizer.prefix.size() + tokenizer.suffix.size());
    const std::int64_t shortest = std::max<std::int64_t>(1, around);
    require(shortest <= tokenizer.max_length && tokenizer.max_length <= kMaxTokens,
            join(where, "max_length"),
            "is " + text(tokenizer.max_length) +
                "; with the prefix and the suffix it is at least " + text(shortest) +
                ", and at most " + text(kMaxTokens));
    for (const auto& [name, side] : {std::pair{"padding_side", &tokenizer.padding_side},
                                     {"truncation_side", &tokenizer.truncation_side}}) {
        require(*side == "left" || *side == "right", join(where, name),
                "is " + in_quotes(*side) + "; it is 'left' or 'right'");
    }
}

void check_quality(const QualityRecord& quality) {
    const auto check_ratio = [](const char* where, double ratio) {
        require(
            0 <= ratio && ratio <= kMaxDecibels, where,
            "is " + digits(ratio) + "; it must be between 0 and " + rounded(kMaxDecibels) + " dB");
    };
    check_ratio("quality.min_psnr", quality.min_psnr);
    if (quality.min_sqnr) check_ratio("quality.min_sqnr", *quality.min_sqnr);
    require(0 <= quality.min_ssim && quality.min_ssim <= 1, "quality.min_ssim",
            "is " + digits(quality.min_ssim) + "; it must be between 0 and 1");
}

void check_size(const char* where, std::int64_t value, std::int64_t most) {
    require(value > 0, where, "is " + text(value) + "; it must be positive");
    require(value <= most, where,
            "is " + text(value) + "; it is at most " + rounded(static_cast<double>(most)));
}

// What a host allocates and computes follows from these.
void check_sizes(const Manifest& manifest) {
    check_size("latents.channels", manifest.latents.channels, 4096);
    check_size("latents.patch_size", manifest.latents.patch_size, 64);
    check_size("latents.spatial_factor", manifest.latents.spatial_factor, 1024);
    check_size("defaults.height", manifest.defaults.height, kMaxSide);
    check_size("defaults.width", manifest.defaults.width, kMaxSide);
    check_size("defaults.num_inference_steps", manifest.defaults.num_inference_steps, kMaxSteps);
    check_size("defaults.max_sequence_length", manifest.defaults.max_sequence_length, kMaxTokens);
}

void check_constants(const Manifest& manifest) {
    const LatentSpec& latents = manifest.latents;
    check_range("latents.scaling_factor", std::abs(latents.scaling_factor), 1 / kLarge, kLarge);
    check_range("latents.shift_factor", latents.shift_factor, -kLarge, kLarge);
    // Below 1, the frequencies would rise from one pair of channels to the next, without a bound.
    check_range("rope.theta", manifest.rope.theta, 1, kLarge * kLarge);
    const auto& axes = manifest.rope.axes_dims;
    const auto is_even = [](std::int64_t size) { return size > 0 && size % 2 == 0; };
    require(axes.size() >= 2 && std::all_of(axes.begin(), axes.end(), is_even), "rope.axes_dims",
            "is " + listed_sizes(axes) +
                "; rows and columns take two axes, and each axis an even, positive number of "
                "channels");
    for (std::size_t i = 0; i < axes.size(); ++i) {
        require(axes[i] <= kMaxAxis, at("rope.axes_dims", i),
                "is " + text(axes[i]) + "; it is at most " + text(kMaxAxis));
    }
}

// Image tokens along a side of the default picture.
std::int64_t tokens_along(const Manifest& manifest, std::int64_t pixels) {
    return pixels / (manifest.latents.patch_size * manifest.latents.spatial_factor);
}

std::int64_t image_tokens(const Manifest& manifest) {
    return tokens_along(manifest, manifest.defaults.height) *
           tokens_along(manifest, manifest.defaults.width);
}

void check_dynamic_shift(const Manifest& manifest) {
    const ScheduleSpec& schedule = manifest.schedule;
    require(
        0 < schedule.base_image_seq_len && schedule.base_image_seq_len < schedule.max_image_seq_len,
        "schedule.base_image_seq_len",
        "must be positive and less than max_image_seq_len where shifting is dynamic");
    const double slope =
        (schedule.max_shift - schedule.base_shift) /
        static_cast<double>(schedule.max_image_seq_len - schedule.base_image_seq_len);
    const std::int64_t above = image_tokens(manifest) - schedule.base_image_seq_len;
    const double mu = schedule.base_shift + slope * static_cast<double>(above);
    const bool exponential = schedule.time_shift_type == "exponential";
    const double least = exponential ? -kMaxExponent : 1 / kLarge;
    const double most = exponential ? kMaxExponent : kLarge;
    require(least <= mu && mu <= most, "schedule.max_shift",
            "and base_shift make a shift of " + rounded(mu) +
                " for a picture of the default size: it must be from " + rounded(least) + " to " +
                rounded(most));
}

// What would make noise levels that are no numbers.
void check_schedule(const Manifest& manifest) {
    const ScheduleSpec& schedule = manifest.schedule;
    check_range("schedule.shift", schedule.shift, 1 / kLarge, kLarge);
    check_range("schedule.base_shift", schedule.base_shift, -kMaxExponent, kMaxExponent);
    check_range("schedule.max_shift", schedule.max_shift, -kMaxExponent, kMaxExponent);
    const double terminal = schedule.shift_terminal.value_or(0);
    require(0 <= terminal && terminal < 1, "schedule.shift_terminal",
            "is " + digits(terminal) + "; it must be null, or from 0 to less than 1");
    require(terminal == 0 || manifest.defaults.num_inference_steps > 1,
            "defaults.num_inference_steps",
            "is 1, and one step cannot reach schedule.shift_terminal");
    require(schedule.time_shift_type == "exponential" || schedule.time_shift_type == "linear",
            "schedule.time_shift_type",
            "is " + in_quotes(schedule.time_shift_type) + "; it must be 'exponential' or 'linear'");
    const std::string spacing = schedule.spacing.value_or("beta");
    require(std::count(std::begin(kSpacings), std::end(kSpacings), spacing) > 0, "schedule.spacing",
            "is " + in_quotes(spacing) + "; it must be null or one of " + listed(kSpacings));
    if (schedule.use_dynamic_shifting) check_dynamic_shift(manifest);
}

// `records[index]`, whose place is `where`.
void check_skips(const std::vector<SkipRecord>& records, std::size_t index,
                 const std::string& where) {
    const SkipRecord& record = records[index];
    const std::int64_t count = record.num_inference_steps;
    require(1 <= count && count <= kMaxSteps, join(where, "num_inference_steps"),
            "is " + text(count) + "; it must be from 1 to " + text(kMaxSteps));
    bool rising = true;
    std::int64_t before = 0;
    for (const std::int64_t step : record.steps) {
        rising = rising && before < step && step < count;
        before = step;
    }
    require(rising, join(where, "steps"), "must rise, from 1 to at most " + text(count - 1));
    require(0 <= record.order && record.order <= kMaxOrder, join(where, "order"),
            "is " + text(record.order) + "; it must be from 0 to " + text(kMaxOrder));
    for (const auto& [name, size] : {std::pair{"height", record.height}, {"width", record.width}}) {
        require(1 <= size && size <= kMaxSide, join(where, name),
                "is " + text(size) + "; it is 1 to " + text(kMaxSide));
    }
    check_range(join(where, "min_psnr"), record.min_psnr, 0, kMaxDecibels);
    check_range(join(where, "psnr"), record.psnr, record.min_psnr, kMaxDecibels);
    require(record.pictures >= 1, join(where, "pictures"),
            "is " + text(record.pictures) + "; 1 is the least");
    const auto end = records.begin() + static_cast<std::ptrdiff_t>(index);
    const bool first = std::none_of(records.begin(), end, [&](const SkipRecord& other) {
        return other.sampler == record.sampler && other.num_inference_steps == count;
    });
    require(first, where, "has the sampler and the steps of an earlier one");
}

// Colours of a preview, for each channel of the latents.
void check_colours(const std::vector<double>& colours, const std::string& where) {
    require(colours.size() == 3, where,
            "has " + std::to_string(colours.size()) + " numbers; there are 3 colours");
    for (std::size_t i = 0; i < colours.size(); ++i) {
        check_range(at(where, i), colours[i], -kLarge, kLarge);
    }
}

void check_preview(const PreviewSpec& preview, std::int64_t channels) {
    require(static_cast<std::int64_t>(preview.matrix.size()) == channels, "preview.matrix",
            "has " + std::to_string(preview.matrix.size()) + " rows; latents.channels is " +
                text(channels));
    for (std::size_t i = 0; i < preview.matrix.size(); ++i) {
        check_colours(preview.matrix[i], at("preview.matrix", i));
    }
    check_colours(preview.bias, "preview.bias");
}

// A picture has `factor` pixels a latent along each side, in each size that an engine takes.
void check_sides(const std::map<std::string, DimensionRange>& dimensions, std::int64_t factor,
                 const std::string& where) {
    for (const auto& [pixels, latents] : {std::pair{"H", "h"}, {"W", "w"}}) {
        const auto many = dimensions.find(pixels);
        const auto few = dimensions.find(latents);
        if (many == dimensions.end() || few == dimensions.end()) continue;
        require(many->second.min / factor == few->second.min &&
                    many->second.opt / factor == few->second.opt &&
                    many->second.max / factor == few->second.max,
                join(where, latents),
                std::string("does not fit ") + pixels + ": latents.spatial_factor makes it " +
                    text(factor) + " times as large");
    }
}

// What a host uses where the caller says nothing must be what the engines take.
void check_engines_take_defaults(const Manifest& manifest) {
    const Defaults& defaults = manifest.defaults;
    const std::int64_t factor = manifest.latents.spatial_factor;
    const std::int64_t words = defaults.max_sequence_length;
    const std::int64_t image = image_tokens(manifest);
    const std::map<std::string, std::pair<std::int64_t, const char*>> sizes{
        {"B", {1, "a picture"}},
        {"S", {words, "defaults.max_sequence_length"}},
        {"L", {image, "the default picture"}},
        {"T", {words + image, "the default picture with its text"}},
        {"V", {1, "a picture that sees no other"}},
        {"N", {defaults.num_inference_steps, "defaults.num_inference_steps"}},
        {"H", {defaults.height, "defaults.height"}},
        {"W", {defaults.width, "defaults.width"}},
        {"h", {defaults.height / factor, "defaults.height"}},
        {"w", {defaults.width / factor, "defaults.width"}},
    };
    for (const auto& [name, component] : manifest.components) {
        for (std::size_t i = 0; i < component.engines.size(); ++i) {
            const auto& dimensions = component.engines[i].dimensions;
            const std::string where =
                join(at(join(join("components", name), "engines"), i), "dimensions");
            for (const auto& [symbol, allowed] : dimensions) {
                const auto& [size, what] = sizes.at(symbol);
                require(allowed.min <= size && size <= allowed.max, join(where, symbol),
                        "is " + text(allowed.min) + " to " + text(allowed.max) + "; " + what +
                            " needs " + text(size));
            }
            check_sides(dimensions, factor, where);
        }
    }
}

void check_defaults(const Manifest& manifest) {
    const Defaults& defaults = manifest.defaults;
    check_range("defaults.guidance_scale", defaults.guidance_scale, 0, kLarge);
    require(0 < defaults.strength && defaults.strength <= 1, "defaults.strength",
            "is " + digits(defaults.strength) + "; it must be above 0 and at most 1");
    const std::int64_t multiple = manifest.latents.patch_size * manifest.latents.spatial_factor;
    for (const auto& [name, value] :
         {std::pair{"defaults.height", defaults.height}, {"defaults.width", defaults.width}}) {
        require(value % multiple == 0, name,
                "is " + text(value) + "; it must be a multiple of " + text(multiple));
    }
    if (const auto t5 = manifest.tokenizers.find("t5"); t5 != manifest.tokenizers.end()) {
        const auto shortest =
            static_cast<std::int64_t>(t5->second.prefix.size() + t5->second.suffix.size());
        const std::int64_t length = defaults.max_sequence_length;
        require(shortest <= length && length <= t5->second.max_length,
                "defaults.max_sequence_length",
                "is " + text(length) + "; tokenizers.t5 makes " + text(shortest) + " to " +
                    text(t5->second.max_length) + " tokens");
    }
    check_engines_take_defaults(manifest);
}

// Whether text there is free-form: in the `provenance` of the manifest and of its editions.
bool is_free(const std::string& where) {
    const std::string editions = "editions[", name = "provenance";
    if (where == name) return true;
    if (where.compare(0, editions.size(), editions) != 0) return false;
    const auto end = where.find_first_not_of("0123456789", editions.size());
    return end != std::string::npos && end > editions.size() &&
           where.compare(end, std::string::npos, "]." + name) == 0;
}

}  // namespace

std::string path_problem(const std::string& path) {
    if (path.empty()) return "is empty";
    if (has_hidden(path)) return "holds a control character";
    if (path.find('\\') != path.npos) {
        return "holds a backslash; paths have forward slashes";
    }
    const bool drive =
        path.size() > 1 && path[1] == ':' && ((path[0] | 0x20) >= 'a' && (path[0] | 0x20) <= 'z');
    if (path[0] == '/' || drive) return "is absolute; paths are relative to the bundle";
    const auto parts = split(path);
    const auto has = [&](const char* part) {
        return std::find(parts.begin(), parts.end(), part) != parts.end();
    };
    if (has("..")) return "leaves the bundle";
    if (has("") || has(".")) return "has an empty part";
    const bool long_name = std::any_of(
        parts.begin(), parts.end(), [](const std::string& part) { return part.size() > kMaxName; });
    if (long_name || decode_utf8(path).size() > kMaxPath) {
        return "is longer than file systems allow";
    }
    return "";
}

void check_text(const Json& json, const std::string& where, int depth) {
    require(depth <= kMaxDepth, where,
            "is nested more than " + std::to_string(kMaxDepth) + " deep");
    const bool free = is_free(where);
    const auto check = [&](const std::string& given, int deep) {
        require(deep <= kMaxDepth, where,
                "is nested more than " + std::to_string(kMaxDepth) + " deep");
        std::string shown = Json{given}.text();
        shown.front() = shown.back() = '\'';
        require(free || !has_hidden(given), where,
                "is " + shown + ", which holds a control character");
    };
    if (const auto* given = json.as<std::string>()) {
        check(*given, depth);
    } else if (const auto* array = json.as<Json::Array>()) {
        for (std::size_t i = 0; i < array->size(); ++i) {
            check_text((*array)[i], free ? where : at(where, i), depth + 1);
        }
    } else if (const auto* object = json.as<Json::Object>()) {
        for (const auto& member : *object) {
            check(member.key, depth + 1);
            check_text(member.value, free ? where : join(where, member.key), depth + 1);
        }
    }
}

// All tasks of a bundle are done by one transformer, which reads so many channels.
void check_tasks(const Manifest& manifest) {
    const auto& tasks = manifest.tasks;
    require(!tasks.empty(), "tasks", "is empty; a bundle does something");
    std::set<std::int64_t> read;
    for (std::size_t i = 0; i < tasks.size(); ++i) {
        const bool known =
            std::find(std::begin(kTasks), std::end(kTasks), tasks[i]) != std::end(kTasks);
        require(known, at("tasks", i),
                "is " + in_quotes(tasks[i]) + "; it must be one of " + listed(kTasks));
        require(std::find(tasks.begin(), tasks.begin() + static_cast<std::ptrdiff_t>(i),
                          tasks[i]) == tasks.begin() + static_cast<std::ptrdiff_t>(i),
                at("tasks", i), "is " + in_quotes(tasks[i]) + ", as an earlier one");
        read.insert(manifest.latents.channels_read(tasks[i]));
    }
    const std::size_t axes = manifest.rope.axes_dims.size();
    require(axes > 2 || !manifest.does("kontext"), "tasks",
            "has kontext, whose pictures take an axis of their own, and rope.axes_dims has " +
                std::to_string(axes));
    std::string counts;
    for (const std::int64_t count : read) counts += (counts.empty() ? "" : ", ") + text(count);
    require(read.size() == 1, "tasks", "needs transformers of " + counts + " channels at once");
}

// controlnet, or controlnet_2 to controlnet_99.
bool is_controlnet(const std::string& name) {
    const std::string first = "controlnet";
    if (name.rfind(first, 0) != 0) return false;
    const std::string rest = name.substr(first.size());
    if (rest.empty()) return true;
    const auto is_digit = [](char c, char least) { return least <= c && c <= '9'; };
    return rest[0] == '_' && (rest.size() == 2 || rest.size() == 3) && is_digit(rest[1], '2') &&
           (rest.size() == 2 || is_digit(rest[2], '0'));
}

// `records[index]`, whose place is `where`, and its components.
void check_controlnet(const Manifest& manifest, std::size_t index, const std::string& where) {
    const auto& records = manifest.controlnets;
    const ControlNetRecord& record = records[index];
    require(
        is_controlnet(record.component), join(where, "component"),
        "is " + in_quotes(record.component) + "; it must be controlnet, or controlnet_2 and so on");
    const auto end = records.begin() + static_cast<std::ptrdiff_t>(index);
    require(std::none_of(
                records.begin(), end,
                [&](const ControlNetRecord& other) { return other.component == record.component; }),
            where, "has the component of an earlier one");
    for (const std::string& needed : {record.component, record.conditioner()}) {
        require(manifest.components.count(needed) > 0, join(where, "component"),
                "needs the component " + needed + ", which there is not");
    }
    require(0 <= record.modes && record.modes <= kMaxModes, join(where, "modes"),
            "is " + text(record.modes));
    std::set<std::string> given;
    for (const auto& spec : manifest.components.at(record.conditioner()).inputs) {
        given.insert(spec.name);
    }
    std::string takes;
    for (const auto& name : given) takes += (takes.empty() ? "" : ", ") + name;
    require((record.modes > 0) == (given.count("control_mode") > 0), join(where, "modes"),
            "is " + text(record.modes) + ", and " + record.conditioner() + " takes " +
                (takes.empty() ? "nothing" : takes));
}

// The residuals in one tensor of them.
std::int64_t residuals_in(const TensorSpec& spec) {
    const auto* size = spec.shape.empty() ? nullptr : std::get_if<std::int64_t>(&spec.shape[0]);
    return size ? *size : 0;
}

// Each has its components, and the transformer takes what all of them give.
void check_controlnets(const Manifest& manifest) {
    const auto& records = manifest.controlnets;
    require(!records.empty() == manifest.does("controlnet"), "controlnets",
            "must name one or more where tasks has controlnet, and none elsewhere");
    for (std::size_t i = 0; i < records.size(); ++i) {
        check_controlnet(manifest, i, at("controlnets", i));
    }
    const auto transformer = manifest.components.find("transformer");
    if (transformer == manifest.components.end()) return;
    for (const auto& spec : transformer->second.inputs) {
        if (!is_residuals(spec.name)) continue;
        const std::string where = "components.transformer.inputs." + spec.name;
        require(!records.empty(), where, "is what ControlNets give, and controlnets names none");
        for (const auto& record : records) {
            for (const auto& output : manifest.components.at(record.component).outputs) {
                require(output.name != spec.name || residuals_in(output) >= residuals_in(spec),
                        where,
                        "has " + text(residuals_in(spec)) + " residuals, and " + record.component +
                            " gives " + text(residuals_in(output)));
            }
        }
    }
}

namespace {

// Each is for a runtime of its own, by which a host asks for it.
void check_runtime(const Manifest& edition, const std::string& where,
                   std::set<std::string>& known) {
    const auto transformer = edition.components.find("transformer");
    require(transformer != edition.components.end() && !transformer->second.engines.empty(), where,
            "has no transformer with an engine, by whose runtime an edition is known");
    require(known.insert(edition.runtime()).second, where + ".transformer.engines[0].runtime",
            "is " + in_quotes(edition.runtime()) + ", as that of an earlier edition");
}

void check_edition(const Manifest& manifest) {
    for (const auto& [name, component] : manifest.components) {
        check_component(component, join("components", name));
    }
    for (const auto& [name, tokenizer] : manifest.tokenizers) {
        check_tokenizer(tokenizer, join("tokenizers", name));
    }
    check_quality(manifest.quality);
    check_sizes(manifest);
    check_constants(manifest);
    check_schedule(manifest);
    check_tasks(manifest);
    check_controlnets(manifest);
    for (std::size_t i = 0; i < manifest.skips.size(); ++i) {
        check_skips(manifest.skips, i, at("skips", i));
    }
    if (manifest.preview) check_preview(*manifest.preview, manifest.latents.channels);
    check_boundary(manifest);
    check_defaults(manifest);
}

}  // namespace

void check_manifest(const Manifest& manifest) {
    check_counts(manifest);
    KnownFiles known;
    for (const auto& [name, component] : manifest.components) {
        check_files_of(component.files, join("components", name), known);
    }
    for (const auto& [name, tokenizer] : manifest.tokenizers) {
        check_files_of(tokenizer.files, join("tokenizers", name), known);
    }
    const auto& editions = manifest.editions;
    for (std::size_t i = 0; i < editions.size(); ++i) {
        for (const auto& [name, component] : editions[i].components) {
            check_files_of(component.files, join(at("editions", i), "components." + name), known);
        }
    }
    std::set<std::string> runtimes;
    if (!editions.empty()) check_runtime(manifest, "components", runtimes);
    for (std::size_t i = 0; i < editions.size(); ++i) {
        check_runtime(editions[i], join(at("editions", i), "components"), runtimes);
    }
    check_edition(manifest);
    for (std::size_t i = 0; i < editions.size(); ++i) {
        try {
            check_counts(editions[i]);
            check_edition(editions[i]);
        } catch (const FieldError& error) {
            throw FieldError("", join(at("editions", i), error.what()));
        }
    }
}

}  // namespace fluxdeploy
