#include "host/prompts.hpp"

#include <algorithm>

namespace fluxdeploy {
namespace {

constexpr std::int64_t kKeptNumbers = (128 << 20) / 4;  // 16 of FLUX.1's texts, at 512 tokens

}  // namespace

PromptEncoder::PromptEncoder(std::shared_ptr<const Tokenizers> tokenizers)
    : tokenizers_(std::move(tokenizers)) {}

Condition PromptEncoder::encode(const std::vector<Prompt>& prompts, std::int64_t images_each,
                                std::int64_t length, const std::vector<float>& levels,
                                std::optional<double> guidance, const Run& run) {
    std::vector<const Prompt*> distinct;
    Condition condition;
    for (const Prompt& prompt : prompts) {
        const auto known = std::find_if(distinct.begin(), distinct.end(),
                                        [&](const Prompt* each) { return *each == prompt; });
        const std::int64_t number = known - distinct.begin();
        if (known == distinct.end()) distinct.push_back(&prompt);
        condition.pictures.insert(condition.pictures.end(), static_cast<std::size_t>(images_each),
                                  number);
    }
    const auto number = static_cast<std::int64_t>(distinct.size());
    Ints clip({number, tokenizers_->clip.record().max_length}, {});
    Ints t5({number, length}, {});
    for (const Prompt* prompt : distinct) {
        const auto ids = prompt->tokenized ? prompt->clip : tokenizers_->clip.encode(prompt->text);
        clip.values.insert(clip.values.end(), ids.begin(), ids.end());
        const auto more =
            prompt->tokenized ? prompt->t5 : tokenizers_->t5.encode(prompt->text, length);
        t5.values.insert(t5.values.end(), more.begin(), more.end());
    }
    // Copies: what is kept may go when the second is encoded.
    const Floats pooled = encoded("clip", "pooled_embeddings", std::move(clip), run);
    const Floats text = encoded("t5", "text_embeddings", std::move(t5), run);
    const Floats timestep({static_cast<std::int64_t>(levels.size())}, levels);
    Floats scale({number});
    Inputs inputs{{"text_embeddings", text}, {"pooled_embeddings", pooled}, {"timestep", timestep}};
    if (guidance) {
        std::fill(scale.values.begin(), scale.values.end(), static_cast<float>(*guidance));
        inputs.emplace("guidance", scale);
    }
    Outputs outputs = run("conditioner", inputs);
    condition.context = std::move(outputs.at("context"));
    condition.modulation = std::move(outputs.at("modulation"));
    return condition;
}

std::vector<std::string> PromptEncoder::cuts(const std::vector<Prompt>& prompts,
                                             std::int64_t length, const std::string& what) const {
    std::vector<std::string> sentences;
    const std::int64_t longest_clip = tokenizers_->clip.record().max_length;
    const std::int64_t longest_t5 = tokenizers_->t5.record().max_length;
    for (std::size_t number = 0; number < prompts.size(); ++number) {
        const Prompt& prompt = prompts[number];
        if (prompt.tokenized) continue;
        const std::int64_t clip = tokenizers_->clip.count(prompt.text);
        const std::int64_t t5 = tokenizers_->t5.count(prompt.text);
        std::string cut;
        const auto note = [&](const std::string& name, std::int64_t all, std::int64_t kept) {
            if (all <= kept) return;
            cut += (cut.empty() ? "" : ", and ") + name + " reads " + std::to_string(kept) +
                   " of its " + std::to_string(all) + " tokens";
        };
        note("T5", t5, length);
        note("CLIP", clip, longest_clip);
        if (cut.empty()) continue;
        const std::string which = prompts.size() > 1 ? what + " " + std::to_string(number + 1) +
                                                           " of " + std::to_string(prompts.size())
                                                     : what;
        const bool more = t5 > length && length < longest_t5;
        sentences.push_back(which + " is cut: " + cut + "." +
                            (more ? " Raise `max_sequence_length`, or shorten it." : ""));
    }
    return sentences;
}

const Floats& PromptEncoder::encoded(const std::string& component, const std::string& output,
                                     Ints ids, const Run& run) {
    const auto known = std::find_if(kept_.begin(), kept_.end(), [&](const Kept& each) {
        return each.component == component && each.ids.shape == ids.shape &&
               each.ids.values == ids.values;
    });
    if (known != kept_.end()) {
        kept_.splice(kept_.end(), kept_, known);
        return kept_.back().values;
    }
    Outputs outputs = run(component, {{"input_ids", ids}});
    kept_.push_back({component, std::move(ids), std::move(outputs.at(output))});
    std::int64_t numbers = 0;
    for (const Kept& each : kept_) numbers += each.values.size();
    while (numbers > kKeptNumbers && kept_.size() > 1) {
        numbers -= kept_.front().values.size();
        kept_.pop_front();
    }
    return kept_.back().values;
}

}  // namespace fluxdeploy
