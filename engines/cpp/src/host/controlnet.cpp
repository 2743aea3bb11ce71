#include "host/controlnet.hpp"

#include <algorithm>

#include "arguments.hpp"
#include "errors.hpp"
#include "host/encoding.hpp"

namespace fluxdeploy {
namespace {

constexpr double kMostScale = 1e3;

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::usage, message); }

// What is given for each of several ControlNets: one for all, or one for each.
template <class Value>
std::vector<Value> each(const std::string& name, const std::vector<Value>& values, Value usual,
                        std::size_t count) {
    if (values.empty()) return std::vector<Value>(count, usual);
    if (values.size() == 1) return std::vector<Value>(count, values.front());
    if (values.size() != count) {
        refuse("`" + name + "` has " + std::to_string(values.size()) +
               " entries, and this bundle " + std::to_string(count) +
               " ControlNets. Give one for all, or one for each.");
    }
    return values;
}

// The mode for each ControlNet: one for all is for those that have modes.
std::vector<std::int64_t> modes_of(const std::vector<std::int64_t>& given,
                                   const std::vector<ControlNetRecord>& records) {
    std::vector<std::int64_t> modes = each("control_mode", given, kNoMode, records.size());
    const bool some = std::any_of(records.begin(), records.end(),
                                  [](const ControlNetRecord& record) { return record.modes > 0; });
    if (given.size() > 1 || !some) return modes;
    for (std::size_t i = 0; i < records.size(); ++i) {
        if (records[i].modes == 0) modes[i] = kNoMode;
    }
    return modes;
}

// The kind of control, where a ControlNet tells several apart.
std::optional<std::int64_t> check_mode(std::int64_t mode, const ControlNetRecord& record) {
    if (record.modes == 0) {
        if (mode == kNoMode) return std::nullopt;
        refuse("`control_mode` has no place here: " + record.component +
               " knows one kind of control. Leave it out.");
    }
    if (mode == kNoMode) {
        refuse(record.component + " tells " + std::to_string(record.modes) +
               " kinds of control apart. Give `control_mode`, 0 to " +
               std::to_string(record.modes - 1) + "; its model card says which is which.");
    }
    return check_integer("control_mode", mode, 0, record.modes - 1);
}

// Tokens of control pictures that a ControlNet makes of pixels itself, [Bc, L, C].
Floats from_pixels(const std::string& encoder, const Floats& images, const Shape& wanted,
                   const Run& run) {
    Floats tokens({images.shape[0], wanted[1], wanted[2]}, {});
    const Shape one{1, images.shape[1], images.shape[2], images.shape[3]};
    for (std::int64_t image = 0; image < images.shape[0]; ++image) {
        const Outputs made =
            run(encoder, {{"images", View(one, images.data() + image * count(one))}});
        const Floats& own = made.at("control_latents");
        if (own.shape != wanted) {
            throw Error(ErrorCode::engine, "The " + encoder + " gave " + shown(own.shape) +
                                               " where tokens are " + shown(wanted) +
                                               ". Build the bundle again with `fluxdeploy build`.");
        }
        tokens.values.insert(tokens.values.end(), own.values.begin(), own.values.end());
    }
    return tokens;
}

}  // namespace

bool ControlInput::counts() const {
    return std::any_of(scales.begin(), scales.end(), [](float scale) { return scale != 0; });
}

ControlNet::ControlNet(const Manifest& manifest, const Request& request, const Arguments& arguments,
                       std::unique_ptr<Task> plain)
    : manifest_(manifest), request_(request), plain_(std::move(plain)) {
    const std::vector<ControlNetRecord>& records = manifest.controlnets;
    const std::size_t count = records.size();
    const auto& sets = arguments.control_images;
    if (sets.size() > count) {
        refuse("There are control images of " + std::to_string(sets.size()) +
               " ControlNets, and this bundle has " + std::to_string(count) +
               ". Give those of its own.");
    }
    const bool all = sets.size() == count && std::none_of(sets.begin(), sets.end(),
                                                          [](const auto& s) { return s.empty(); });
    if (!all) {
        refuse("This bundle has " + std::to_string(count) +
               " ControlNets. Give `control_image` as a list with what each of them takes, in the "
               "order in which it was built with them.");
    }
    const auto modes = modes_of(arguments.control_mode, records);
    const auto scales = each("controlnet_conditioning_scale",
                             arguments.controlnet_conditioning_scale, kControlScale, count);
    const auto starts =
        each("control_guidance_start", arguments.control_guidance_start, kControlStart, count);
    const auto ends =
        each("control_guidance_end", arguments.control_guidance_end, kControlEnd, count);
    for (std::size_t i = 0; i < count; ++i) {
        given_.push_back(
            {records[i], read_controls(sets[i], request), check_mode(modes[i], records[i]),
             check_number("controlnet_conditioning_scale", scales[i], -kMostScale, kMostScale),
             check_number("control_guidance_start", starts[i], 0, 1),
             check_number("control_guidance_end", ends[i], 0, 1)});
    }
}

AskedSizes ControlNet::engine_sizes() const {
    const std::int64_t height = request_.height, width = request_.width;
    const std::int64_t text = request_.max_sequence_length;
    const TokenGrid grid = token_grid(height, width, manifest_.latents);
    const std::int64_t tokens = grid.rows * grid.columns;
    AskedSizes sizes = encoder_sizes(height, width, manifest_.latents);
    for (const ControlNetRecord& record : manifest_.controlnets) {
        sizes.push_back({record.component, {{"L", tokens}, {"S", text}, {"T", text + tokens}}});
        sizes.push_back({record.conditioner(), {{"S", text}}});
        if (takes_pixels(record)) {
            sizes.push_back({record.encoder(), {{"H", height}, {"W", width}, {"L", tokens}}});
        }
    }
    return sizes;
}

std::vector<std::string> ControlNet::notices() const {
    std::vector<std::string> found = plain_->notices();
    for (const Controlled& given : given_) {
        const std::vector<float> own = scales(given);
        if (std::any_of(own.begin(), own.end(), [](float scale) { return scale != 0; })) {
            return found;
        }
    }
    found.push_back("`control_image` does nothing: in none of " + std::to_string(steps()) +
                    " steps a ControlNet counts. Raise `controlnet_conditioning_scale` or "
                    "`control_guidance_end`, or lower `control_guidance_start`.");
    return found;
}

Start ControlNet::prepare(const std::vector<float>& sigmas, Generators& generators,
                          const Run& run) const {
    const LatentSpec& spec = manifest_.latents;
    const std::int64_t batch = request_.batch();
    const TokenGrid grid = token_grid(request_.height, request_.width, spec);
    const Shape tokens{1, grid.rows * grid.columns, spec.token_channels()};
    std::vector<ControlInput> controls;
    for (const Controlled& given : given_) {
        Floats latents =
            takes_pixels(given.record)
                ? repeat_each(from_pixels(given.record.encoder(), given.images, tokens, run), batch)
                : control_latents(given.images, batch, spec, generators, run);
        controls.push_back({given.record, std::move(latents), given.mode, scales(given)});
    }
    Start start = plain_->prepare(sigmas, generators, run);
    start.controls = std::move(controls);
    return start;
}

// What residuals are multiplied with in each step.
std::vector<float> ControlNet::scales(const Controlled& given) const {
    const auto number = static_cast<double>(steps());
    std::vector<float> found;
    for (std::int64_t step = 0; step < steps(); ++step) {
        const auto begun = static_cast<double>(step), ended = static_cast<double>(step + 1);
        const bool inside = given.start <= begun / number && ended / number <= given.end;
        found.push_back(inside ? static_cast<float>(given.scale) : 0.0f);
    }
    return found;
}

bool ControlNet::takes_pixels(const ControlNetRecord& record) const {
    return manifest_.components.count(record.encoder()) != 0;
}

}  // namespace fluxdeploy
