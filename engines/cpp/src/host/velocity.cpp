#include "host/velocity.hpp"

#include <algorithm>

#include "errors.hpp"
#include "files/boundary.hpp"

namespace fluxdeploy {
namespace {

// What a transformer with an IP-Adapter is given, which sees nothing here: [n, B, 1, D]. A token
// whose value is zero adds nothing.
std::map<std::string, Floats> zero_seen(const Engine& transformer, std::int64_t pictures) {
    std::map<std::string, Floats> zeros;
    for (const TensorSpec& spec : transformer.inputs) {
        if (std::find(std::begin(kSeen), std::end(kSeen), spec.name) == std::end(kSeen)) continue;
        zeros[spec.name] = Floats({std::get<std::int64_t>(spec.shape.front()), pictures, 1,
                                   std::get<std::int64_t>(spec.shape.back())});
    }
    return zeros;
}

}  // namespace

const Floats& HiddenStates::around(const Floats& latents) {
    if (channels_.values.empty() && tokens_.values.empty()) return latents;
    const std::int64_t batch = latents.shape[0], length = latents.shape[1];
    const std::int64_t own = latents.shape[2];
    const std::int64_t beside = channels_.values.empty() ? 0 : channels_.shape[2];
    const std::int64_t behind = tokens_.values.empty() ? 0 : tokens_.shape[1];
    const std::int64_t width = own + beside;
    const bool first = all_.values.empty();
    if (first) all_ = Floats({batch, length + behind, width});
    for (std::int64_t picture = 0; picture < batch; ++picture) {
        float* to = all_.data() + picture * (length + behind) * width;
        for (std::int64_t token = 0; token < length; ++token, to += width) {
            const std::int64_t at = picture * length + token;
            const float* from = latents.data() + at * own;
            std::copy(from, from + own, to);
            if (!first || beside == 0) continue;
            std::copy(channels_.data() + at * beside, channels_.data() + (at + 1) * beside,
                      to + own);
        }
        if (!first || behind == 0) continue;
        const std::int64_t count = behind * width;
        std::copy(tokens_.data() + picture * count, tokens_.data() + (picture + 1) * count, to);
    }
    return all_;
}

ModulatedTransformer::ModulatedTransformer(Engine& engine, const Condition& condition,
                                           const RopeTables& positions, HiddenStates& hidden,
                                           CancelToken cancel, Added added)
    : condition_(condition),
      hidden_(hidden),
      cancel_(std::move(cancel)),
      added_(std::move(added)),
      parts_(divide(engine, static_cast<std::int64_t>(condition.pictures.size()))) {
    const std::int64_t tokens = positions.cos.shape[0] - condition.context.shape[1];
    for (const BatchPart& part : parts_) {
        const auto rows = condition.pictures.begin();
        const bool first = bindings_.count(part.size()) == 0;
        if (!first) continue;
        // Prompts stay in place where all of a size's parts have the same ones.
        const bool same = std::all_of(parts_.begin(), parts_.end(), [&](const BatchPart& other) {
            return other.size() != part.size() ||
                   std::equal(rows + part.start, rows + part.end, rows + other.start);
        });
        Inputs resident{{"rope_cos", positions.cos}, {"rope_sin", positions.sin}};
        if (same) {
            condition.take_context(part, context_);
            resident.emplace("context", context_);
        }
        Residuals zeros;
        if (!added_) zeros = zero_residuals(engine, part.size(), tokens);
        for (const auto& [name, values] : zeros) resident.emplace(name, values);
        const auto nothing = zero_seen(engine, part.size());
        for (const auto& [name, values] : nothing) resident.emplace(name, values);
        bindings_[part.size()] = {engine.bind(resident), same};
    }
}

const float* ModulatedTransformer::operator()(std::int64_t level, const Floats& latents) {
    const Floats& states = hidden_.around(latents);
    const std::int64_t tokens = states.shape[1];
    const std::int64_t channels = states.shape[2];
    const std::int64_t length = latents.shape[1];
    const std::int64_t own = latents.shape[2];
    for (const BatchPart& part : parts_) {
        if (part.start > 0) cancel_.check("in the middle of a step");
        const Bound& bound = bindings_.at(part.size());
        condition_.take_modulation(level, part, modulation_);
        Inputs inputs{
            {"hidden_states",
             View({part.size(), tokens, channels}, states.data() + part.start * tokens * channels)},
            {"modulation", modulation_},
        };
        if (!bound.has_context) {
            condition_.take_context(part, context_);
            inputs.emplace("context", context_);
        }
        if (added_) {
            for (const auto& [name, values] : added_(level, latents, part)) {
                inputs.emplace(name, values);
            }
        }
        const Floats& velocity = bound.binding->run(inputs).at("velocity");
        if (velocity.size() != part.size() * tokens * own) {
            throw Error(ErrorCode::engine,
                        "The transformer gave a velocity of other sizes than its latents'. Build "
                        "the bundle again with `fluxdeploy build`.");
        }
        if (parts_.size() == 1 && tokens == length) return velocity.data();
        if (velocity_.shape != latents.shape) velocity_ = Floats(latents.shape);
        for (std::int64_t row = 0; row < part.size(); ++row) {
            const float* from = velocity.data() + row * tokens * own;
            std::copy(from, from + length * own,
                      velocity_.data() + (part.start + row) * length * own);
        }
    }
    return velocity_.data();
}

}  // namespace fluxdeploy
