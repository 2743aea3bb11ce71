#include "host/prompts.hpp"

#include <algorithm>

namespace fluxdeploy {
namespace {

constexpr std::int64_t kKeptNumbers = (128 << 20) / 4;  // 16 of FLUX.1's texts, at 512 tokens

// What an encoder leaves out of a prompt; empty where that is nothing.
std::string cut(const std::string& encoder, std::int64_t tokens, std::int64_t kept) {
    if (tokens <= kept) return "";
    return encoder + " reads " + std::to_string(kept) + " of its " + std::to_string(tokens) +
           " tokens";
}

// Rows `pictures[start..end]` of `values` [U, ...], one after the other, in `taken`.
void take(const float* values, Shape shape, const std::vector<std::int64_t>& pictures,
          BatchPart part, Floats& taken) {
    const std::int64_t width = count(shape) / shape.front();
    shape.front() = part.size();
    if (taken.shape != shape) taken = Floats(std::move(shape));
    for (std::int64_t row = 0; row < part.size(); ++row) {
        const float* from = values + pictures[static_cast<std::size_t>(part.start + row)] * width;
        std::copy(from, from + width, taken.data() + row * width);
    }
}

}  // namespace

void Condition::take_context(BatchPart part, Floats& taken) const {
    take(context.data(), context.shape, pictures, part, taken);
}

void Condition::take_modulation(std::int64_t level, BatchPart part, Floats& taken) const {
    const Shape rows(modulation.shape.begin() + 1, modulation.shape.end());
    take(modulation.data() + level * count(rows), rows, pictures, part, taken);
}

void Condition::take_mode(BatchPart part, Floats& taken) const {
    take(mode->data(), mode->shape, pictures, part, taken);
}

Condition condition(const EncodedPrompts& prompts, const std::vector<float>& levels,
                    std::optional<double> guidance, const Run& run, const std::string& component,
                    std::optional<std::int64_t> mode) {
    const std::int64_t distinct = prompts.pooled.shape.front();
    const Floats timestep({static_cast<std::int64_t>(levels.size())}, levels);
    Floats scale({distinct});
    Ints kind({distinct, 1});
    Inputs inputs{{"text_embeddings", prompts.text},
                  {"pooled_embeddings", prompts.pooled},
                  {"timestep", timestep}};
    if (guidance) {
        std::fill(scale.values.begin(), scale.values.end(), static_cast<float>(*guidance));
        inputs.emplace("guidance", scale);
    }
    if (mode) {
        std::fill(kind.values.begin(), kind.values.end(), static_cast<std::int32_t>(*mode));
        inputs.emplace("control_mode", kind);
    }
    Outputs outputs = run(component, inputs);
    Condition made;
    made.context = std::move(outputs.at("context"));
    made.modulation = std::move(outputs.at("modulation"));
    if (const auto token = outputs.find("mode"); token != outputs.end()) {
        made.mode = std::move(token->second);
    }
    made.pictures = prompts.pictures;
    return made;
}

PromptEncoder::PromptEncoder(std::shared_ptr<const Tokenizers> tokenizers)
    : tokenizers_(std::move(tokenizers)) {}

Embeddings PromptEncoder::embedded(const std::vector<Prompt>& prompts, std::int64_t length,
                                   const Run& run) {
    Embeddings embeddings;
    std::vector<const Prompt*> distinct;
    for (const Prompt& prompt : prompts) {
        const auto known = std::find_if(distinct.begin(), distinct.end(),
                                        [&](const Prompt* each) { return *each == prompt; });
        embeddings.rows.push_back(known - distinct.begin());
        if (known == distinct.end()) distinct.push_back(&prompt);
    }
    const auto number = static_cast<std::int64_t>(distinct.size());
    Ints clip({number, tokenizers_->clip.record().max_length}, {});
    Ints t5({number, length}, {});
    for (const Prompt* prompt : distinct) {
        const auto ids = prompt->tokenized ? prompt->clip : tokenizers_->clip.encode(prompt->text);
        clip.values.insert(clip.values.end(), ids.begin(), ids.end());
        const auto more =
            prompt->tokenized ? prompt->t5 : tokenizers_->t5.encode(prompt->text_2, length);
        t5.values.insert(t5.values.end(), more.begin(), more.end());
    }
    // Copies: what is kept may go when the second is encoded.
    embeddings.pooled = encoded("clip", "pooled_embeddings", std::move(clip), run);
    embeddings.text = encoded("t5", "text_embeddings", std::move(t5), run);
    return embeddings;
}

EncodedPrompts PromptEncoder::encode(const Text& text, std::int64_t images_each,
                                     std::int64_t length, const Run& run) {
    Embeddings embeddings =
        text.embeddings ? *text.embeddings : embedded(text.prompts, length, run);
    EncodedPrompts encoded{std::move(embeddings.text), std::move(embeddings.pooled), {}};
    for (const std::int64_t row : embeddings.rows) {
        encoded.pictures.insert(encoded.pictures.end(), static_cast<std::size_t>(images_each), row);
    }
    return encoded;
}

std::vector<std::string> PromptEncoder::cuts(const Text& text, std::int64_t length,
                                             const std::string& what) const {
    std::vector<std::string> sentences;
    const auto& prompts = text.prompts;
    const std::int64_t longest_clip = tokenizers_->clip.record().max_length;
    const std::int64_t longest_t5 = tokenizers_->t5.record().max_length;
    for (std::size_t number = 0; number < prompts.size(); ++number) {
        const Prompt& prompt = prompts[number];
        if (prompt.tokenized) continue;
        const std::string which = prompts.size() > 1 ? " " + std::to_string(number + 1) + " of " +
                                                           std::to_string(prompts.size())
                                                     : "";
        const std::int64_t t5 = tokenizers_->t5.count(prompt.text_2);
        const std::string of_clip = cut("CLIP", tokenizers_->clip.count(prompt.text), longest_clip);
        const std::string of_t5 = cut("T5", t5, length);
        const std::string advice = t5 > length && length < longest_t5
                                       ? " Raise `max_sequence_length`, or shorten it."
                                       : "";
        if (prompt.text == prompt.text_2) {
            const std::string both = of_t5.empty() || of_clip.empty() ? "" : ", and ";
            const std::string all = of_t5 + both + of_clip;
            if (!all.empty()) sentences.push_back(what + which + " is cut: " + all + "." + advice);
            continue;
        }
        if (!of_clip.empty()) sentences.push_back(what + which + " is cut: " + of_clip + ".");
        if (!of_t5.empty()) {
            sentences.push_back(what + "_2" + which + " is cut: " + of_t5 + "." + advice);
        }
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
