#include "files/boundary.hpp"

#include <algorithm>
#include <numeric>

#include "files/fields.hpp"
#include "files/words.hpp"

namespace fluxdeploy {
namespace {

// A size is a number; a letter, which is a symbol of the manifest; or words, which are one size
// wherever they stand.
struct Expected {
    std::string name;
    std::vector<Dimension> shape;
};

struct Boundary {
    std::string component;
    std::vector<Expected> inputs;
    std::vector<Expected> outputs;
    // Tensors that it may have or lack.
    std::vector<std::string> optional;
};

// The place of the conditioner, whose last input is `guidance`.
constexpr std::size_t kConditioner = 2;

const std::vector<Boundary>& boundaries() {
    using D = std::vector<Dimension>;
    static const D picture{"B", 3, "H", "W"};
    static const D latents{"B", "the latents' channels", "h", "w"};
    static const D text{"B", "S", "T5's width"};
    static const D context{"B", "S", "the transformer's width"};
    static const D states{"B", "L", "what a task reads"};
    static const D velocity{"B", "L", "a token's channels"};
    static const D rope{"T", "a head's channels"};
    static const D seen{"the blocks that see", "B", "V", "the transformer's width"};
    static const std::vector<Boundary> all{
        {"clip",
         {{"input_ids", {"B", "CLIP's tokens"}}},
         {{"pooled_embeddings", {"B", "CLIP's width"}}},
         {}},
        {"t5", {{"input_ids", {"B", "S"}}}, {{"text_embeddings", text}}, {}},
        {"conditioner",
         {{"text_embeddings", text},
          {"pooled_embeddings", {"B", "CLIP's width"}},
          {"timestep", {"N"}},
          {"guidance", {"B"}}},
         {{"context", context},
          {"modulation", {"N", "B", "the modulation's rows", "the transformer's width"}}},
         {}},
        {"transformer",
         {{"hidden_states", states},
          {"context", context},
          {"modulation", {"B", "the modulation's rows", "the transformer's width"}},
          {"rope_cos", rope},
          {"rope_sin", rope},
          {kResiduals[0], {"double residuals", "B", "L", "the transformer's width"}},
          {kResiduals[1], {"single residuals", "B", "L", "the transformer's width"}},
          {kSeen[0], seen},
          {kSeen[1], seen}},
         {{"velocity", velocity}},
         {kResiduals[0], kResiduals[1], kSeen[0], kSeen[1]}},
        {"vae_decoder", {{"latents", latents}}, {{"images", picture}}, {}},
        {"vae_encoder", {{"images", picture}}, {{"mean", latents}, {"logvar", latents}}, {}},
    };
    return all;
}

// Those of a ControlNet's components; its own model has guidance or not.
std::vector<Boundary> boundaries_of(const ControlNetRecord& record) {
    using D = std::vector<Dimension>;
    const std::string width = "the transformer's width";
    const std::string rows = "the rows of " + record.component;
    const D context{"B", "S", width}, mode{"B", 1, width};
    const D rope{"T", "a head's channels"}, tokens{"B", "L", "a token's channels"};
    Boundary conditioner = boundaries()[kConditioner];
    conditioner.component = record.conditioner();
    conditioner.inputs.push_back({"control_mode", {"B", 1}});
    conditioner.outputs = {
        {"context", context}, {"modulation", {"N", "B", rows, width}}, {"mode", mode}};
    conditioner.optional = {"guidance", "control_mode", "mode"};
    Boundary own{record.component,
                 {{"hidden_states", tokens},
                  {"control_latents", tokens},
                  {"context", context},
                  {"modulation", {"B", rows, width}},
                  {"rope_cos", rope},
                  {"rope_sin", rope},
                  {"mode", mode}},
                 {},
                 {"mode", kResiduals[0], kResiduals[1]}};
    for (const char* name : kResiduals) {
        own.outputs.push_back({name, {name + (" of " + record.component), "B", "L", width}});
    }
    return {{record.encoder(), {{"images", {"B", 3, "H", "W"}}}, {{"control_latents", tokens}}, {}},
            std::move(conditioner),
            std::move(own)};
}

// What is known of a size, and from where.
using Sizes = std::map<std::string, std::pair<std::int64_t, std::string>>;

Sizes sizes_of(const Manifest& manifest) {
    const auto& latents = manifest.latents;
    const auto& axes = manifest.rope.axes_dims;
    const auto head = std::accumulate(axes.begin(), axes.end(), std::int64_t{0});
    Sizes sizes{
        {"the latents' channels", {latents.channels, "latents.channels"}},
        {"a token's channels",
         {latents.token_channels(), "latents, channels times patch_size squared,"}},
        {"what a task reads",
         {latents.channels_read(manifest.tasks.front()),
          "latents, for the task " + manifest.tasks.front() + ","}},
        {"a head's channels", {head, "the sum of rope.axes_dims"}},
    };
    if (const auto clip = manifest.tokenizers.find("clip"); clip != manifest.tokenizers.end()) {
        sizes["CLIP's tokens"] = {clip->second.max_length, "tokenizers.clip.max_length"};
    }
    return sizes;
}

std::string shown(const std::vector<Dimension>& shape) {
    std::string result = "[";
    for (const auto& size : shape) {
        if (result.size() > 1) result += ", ";
        const auto* symbol = std::get_if<std::string>(&size);
        result += symbol ? in_quotes(*symbol) : std::to_string(std::get<std::int64_t>(size));
    }
    return result + "]";
}

bool fits(const Dimension& size, const Dimension& expected) {
    const auto* words = std::get_if<std::string>(&expected);
    if (words && words->size() > 1) return std::holds_alternative<std::int64_t>(size);
    return size == expected;
}

void check_tensor(const std::string& where, const TensorSpec& spec, const Expected& expected,
                  Sizes& known) {
    const bool integer = spec.name == "input_ids" || spec.name == "control_mode";
    const std::string kind = integer ? "int32" : "float32";
    require(spec.dtype == kind, where, "is " + spec.dtype + "; it must be " + kind);
    require(std::equal(spec.shape.begin(), spec.shape.end(), expected.shape.begin(),
                       expected.shape.end(), fits),
            where, "has the shape " + shown(spec.shape) + "; it must be " + shown(expected.shape));
    for (std::size_t i = 0; i < spec.shape.size(); ++i) {
        const auto* words = std::get_if<std::string>(&expected.shape[i]);
        const auto* size = std::get_if<std::int64_t>(&spec.shape[i]);
        if (!words || !size) continue;
        const auto& [other, place] = known.emplace(*words, std::pair{*size, where}).first->second;
        require(*size == other, where,
                "gives " + std::to_string(*size) + " for " + *words + ", and " + place +
                    " makes that " + std::to_string(other));
    }
}

void check_side(const std::string& where, const std::vector<TensorSpec>& specs,
                std::vector<Expected> expected, const std::vector<std::string>& optional,
                Sizes& known) {
    const auto lacks = [&](const Expected& each) {
        return std::count(optional.begin(), optional.end(), each.name) > 0 &&
               std::none_of(specs.begin(), specs.end(),
                            [&](const TensorSpec& spec) { return spec.name == each.name; });
    };
    expected.erase(std::remove_if(expected.begin(), expected.end(), lacks), expected.end());
    std::string wanted;
    std::string found;
    for (const auto& each : expected) wanted += (wanted.empty() ? "" : ", ") + each.name;
    for (const auto& spec : specs) found += (found.empty() ? "" : ", ") + spec.name;
    std::vector<const TensorSpec*> ordered;
    for (const auto& each : expected) {
        const auto spec = std::find_if(specs.begin(), specs.end(), [&](const TensorSpec& given) {
            return given.name == each.name;
        });
        if (spec != specs.end()) ordered.push_back(&*spec);
    }
    // Names are unique on each side, so equal counts are equal sets.
    require(ordered.size() == expected.size() && specs.size() == expected.size(), where,
            "must be " + wanted + ", not " + (found.empty() ? "none" : found));
    for (std::size_t i = 0; i < expected.size(); ++i) {
        check_tensor(join(where, expected[i].name), *ordered[i], expected[i], known);
    }
}

}  // namespace

bool is_residuals(const std::string& name) {
    return std::find(std::begin(kResiduals), std::end(kResiduals), name) != std::end(kResiduals);
}

void check_boundary(const Manifest& manifest) {
    Sizes known = sizes_of(manifest);
    std::vector<Boundary> all = boundaries();
    if (!manifest.guidance_embedding) all[kConditioner].inputs.pop_back();
    for (const auto& record : manifest.controlnets) {
        for (Boundary& each : boundaries_of(record)) all.push_back(std::move(each));
    }
    for (const auto& boundary : all) {
        const auto component = manifest.components.find(boundary.component);
        if (component == manifest.components.end()) continue;
        const std::string where = join("components", boundary.component);
        check_side(join(where, "inputs"), component->second.inputs, boundary.inputs,
                   boundary.optional, known);
        check_side(join(where, "outputs"), component->second.outputs, boundary.outputs,
                   boundary.optional, known);
    }
}

}  // namespace fluxdeploy
