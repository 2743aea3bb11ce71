#include "host/texts.hpp"

#include <algorithm>
#include <numeric>

#include "arguments.hpp"
#include "errors.hpp"

namespace fluxdeploy {
namespace {

// Characters: 512 tokens are some 3,000, and reading a million takes seconds.
constexpr std::int64_t kMaxPrompt = 100000;

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::usage, message); }

// Characters of UTF-8 text: its bytes that begin one.
std::int64_t characters(const std::string& text) {
    return std::count_if(text.begin(), text.end(),
                         [](char c) { return (static_cast<unsigned char>(c) & 0xc0u) != 0x80u; });
}

void check_length(const std::string& name, const std::string& text) {
    const std::int64_t size = characters(text);
    if (size <= kMaxPrompt) return;
    refuse("`" + name + "` has " + std::to_string(size) + " characters; it must have at most " +
           std::to_string(kMaxPrompt) + ", of which the text encoders read a few hundred words.");
}

void check_count(const std::string& what, std::int64_t count, std::int64_t prompts) {
    if (count == prompts) return;
    refuse("There are " + std::to_string(count) + " " + what + " for " + std::to_string(prompts) +
           " prompts. Give one for all, or one for each.");
}

// Prompts, with what T5 reads of each.
std::vector<Prompt> read_prompts(const Words& words, const std::string& side) {
    std::vector<Prompt> prompts = words.prompts;
    for (const Prompt& prompt : prompts) check_length(side + "prompt", prompt.text);
    // As in diffusers, whose empty one stands for the first.
    std::vector<std::string> second = words.prompts_2;
    if (second.empty() || second == std::vector<std::string>{""}) {
        for (Prompt& prompt : prompts) prompt.text_2 = prompt.text;
        return prompts;
    }
    const std::string name = side + "prompt_2";
    for (const std::string& text : second) check_length(name, text);
    if (second.size() == 1) second.resize(prompts.size(), second.front());
    check_count("`" + name + "`", static_cast<std::int64_t>(second.size()),
                static_cast<std::int64_t>(prompts.size()));
    for (std::size_t i = 0; i < prompts.size(); ++i) {
        if (prompts[i].tokenized) {
            refuse("`" + name +
                   "` has no place beside token ids, which are T5's too. Leave it "
                   "out.");
        }
        prompts[i].text_2 = second[i];
    }
    return prompts;
}

// How many numbers the conditioner takes of a token or a prompt; "E" where nobody says.
Dimension width(const Manifest& manifest, const std::string& name) {
    const auto record = manifest.components.find("conditioner");
    if (record == manifest.components.end()) return "E";
    for (const TensorSpec& spec : record->second.inputs) {
        if (spec.name == name && !spec.shape.empty()) return spec.shape.back();
    }
    return "E";
}

// Refuse a shape that is not `wanted`, whose names stand for any size from 1, and NaN and infinity.
const Floats& checked(const std::string& name, const Floats& values,
                      const std::vector<Dimension>& wanted, const std::string& of_what) {
    std::string shape;
    bool fits = values.shape.size() == wanted.size();
    for (std::size_t axis = 0; axis < wanted.size(); ++axis) {
        const auto* size = std::get_if<std::int64_t>(&wanted[axis]);
        shape += axis > 0 ? ", " : "";
        shape += size ? std::to_string(*size) : std::get<std::string>(wanted[axis]);
        fits = fits && (size ? values.shape[axis] == *size : values.shape[axis] >= 1);
    }
    if (!fits) {
        refuse("`" + name + "` has shape " + shown(values.shape) + "; it must be [" + shape +
               "], " + of_what + ".");
    }
    if (!all_finite(values.data(), values.size())) {
        refuse("`" + name + "` holds NaN or infinity. Give finite values.");
    }
    return values;
}

// `side` is what stands before the arguments' names. Nothing where nothing is said.
std::optional<Text> read(const Manifest& manifest, const Words& words, const std::string& side) {
    if (!words.has_embeddings()) {
        if (words.prompts.empty()) return std::nullopt;
        return Text{read_prompts(words, side), std::nullopt};
    }
    const std::string text = side + "prompt_embeds", pooled = side + "pooled_prompt_embeds";
    const std::pair<std::string, bool> given[] = {
        {side + "prompt", !words.prompts.empty()},
        {side + "prompt_2", !words.prompts_2.empty()},
    };
    for (const auto& [name, is_given] : given) {
        if (is_given) refuse("`" + name + "` and embeddings are both given. Give one of them.");
    }
    if (!words.prompt_embeds || !words.pooled_prompt_embeds) {
        const bool first = !words.prompt_embeds;
        refuse("`" + (first ? pooled : text) + "` needs `" + (first ? text : pooled) +
               "` too: the model reads both.");
    }
    const Floats& own =
        checked(text, *words.prompt_embeds, {"P", "S", width(manifest, "text_embeddings")},
                "T5's for P prompts");
    const Floats& own_pooled = checked(pooled, *words.pooled_prompt_embeds,
                                       {own.shape[0], width(manifest, "pooled_embeddings")},
                                       "CLIP's for the prompts of `" + text + "`");
    std::vector<std::int64_t> rows(static_cast<std::size_t>(own.shape[0]));
    std::iota(rows.begin(), rows.end(), 0);
    return Text{{}, Embeddings{own, own_pooled, std::move(rows)}};
}

void check_ids(const std::string& name, const char* encoder, const std::vector<std::int32_t>& ids,
               std::int64_t length) {
    if (static_cast<std::int64_t>(ids.size()) != length) {
        refuse("`" + name + "` has " + std::to_string(ids.size()) + " ids for " + encoder +
               "; it must have " + std::to_string(length) + ", padding included.");
    }
    if (std::any_of(ids.begin(), ids.end(), [](std::int32_t id) { return id < 0; })) {
        refuse("`" + name + "` has an id below 0 for " + encoder + ". Give ids of its tokenizer.");
    }
}

}  // namespace

bool Prompt::operator==(const Prompt& other) const {
    return tokenized == other.tokenized && text == other.text && text_2 == other.text_2 &&
           clip == other.clip && t5 == other.t5;
}

Text read_text(const Manifest& manifest, const Words& words) {
    auto text = read(manifest, words, "");
    if (!text) refuse("Give a `prompt`, or `prompt_embeds` with `pooled_prompt_embeds`.");
    return *std::move(text);
}

std::optional<Text> read_negative_text(const Manifest& manifest, const Words& words,
                                       std::int64_t prompts) {
    auto text = read(manifest, words, "negative_");
    if (!text) return std::nullopt;
    if (text->size() == 1) {
        const auto count = static_cast<std::size_t>(prompts);
        if (text->embeddings) {
            text->embeddings->rows.resize(count, 0);
        } else {
            text->prompts.resize(count, text->prompts.front());
        }
    }
    check_count("negative prompts", text->size(), prompts);
    return text;
}

void check_ids(const Manifest& manifest, const Text& text, const std::string& name,
               std::int64_t length) {
    for (const Prompt& prompt : text.prompts) {
        if (!prompt.tokenized) continue;
        check_ids(name, "CLIP", prompt.clip, manifest.tokenizers.at("clip").max_length);
        check_ids(name, "T5", prompt.t5, length);
    }
}

}  // namespace fluxdeploy
