// From prompts to what the transformer reads of them, and the encoded texts that are kept.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "backends/engine.hpp"
#include "host/batches.hpp"
#include "host/request.hpp"
#include "text/tokenizer.hpp"

namespace fluxdeploy {

// The outputs of a component for one call of the pipeline.
using Run = std::function<Outputs(const std::string& component, const Inputs& inputs)>;

// The tokenizers of a bundle. Threads may share them.
struct Tokenizers {
    Tokenizer clip;
    Tokenizer t5;
};

// What the encoders make of U distinct prompts, [U, S, E] and [U, E'], and for each of B pictures
// which of them is its own.
struct EncodedPrompts {
    Floats text;
    Floats pooled;
    std::vector<std::int64_t> pictures;
};

// What U distinct prompts and E noise levels make of the transformer or of a ControlNet, for B
// pictures: `context` [U, S, D] and `modulation` [E, U, M, D]; `mode` [U, 1, D], the kind of
// control as a text token, where a ControlNet has kinds; `pictures` has the prompt of each of the
// B.
struct Condition {
    Floats context;
    Floats modulation;
    std::optional<Floats> mode;
    std::vector<std::int64_t> pictures;

    // Those of the pictures in a part of the batch, one after the other, in `taken`.
    void take_context(BatchPart part, Floats& taken) const;
    void take_modulation(std::int64_t level, BatchPart part, Floats& taken) const;
    void take_mode(BatchPart part, Floats& taken) const;
};

// Run a conditioner for every noise level; `guidance` where its model has it, `mode` where it knows
// several kinds of control.
Condition condition(const EncodedPrompts& prompts, const std::vector<float>& levels,
                    std::optional<double> guidance, const Run& run,
                    const std::string& component = "conditioner",
                    std::optional<std::int64_t> mode = std::nullopt);

// Encodes prompts with `clip` and `t5`, and keeps the latest 128 MiB of what they gave.
//
// What is kept belongs to the token ids of the prompts that were encoded together, not to each
// prompt alone: activations that are quantized by the whole batch's range make a prompt's numbers
// depend on the others, and equal calls must give equal pictures whatever came before.
class PromptEncoder {
public:
    explicit PromptEncoder(std::shared_ptr<const Tokenizers> tokenizers);

    // Run the encoders. Prompts are padded or cut to `length` T5 tokens; equal ones are encoded
    // once. Embeddings are taken as they are.
    EncodedPrompts encode(const Text& text, std::int64_t images_each, std::int64_t length,
                          const Run& run);

    // A sentence for each of the prompts that is not read to its end. `what` is what they are
    // called: "The prompt".
    std::vector<std::string> cuts(const Text& text, std::int64_t length,
                                  const std::string& what) const;

    const Tokenizers& tokenizers() const { return *tokenizers_; }
    std::shared_ptr<const Tokenizers> share_tokenizers() const { return tokenizers_; }

private:
    // What the encoders make of prompts, one of equal ones; `rows` has one number for each prompt.
    Embeddings embedded(const std::vector<Prompt>& prompts, std::int64_t length, const Run& run);
    const Floats& encoded(const std::string& component, const std::string& output, Ints ids,
                          const Run& run);

    struct Kept {
        std::string component;
        Ints ids;
        Floats values;
    };

    std::shared_ptr<const Tokenizers> tokenizers_;
    std::list<Kept> kept_;  // the latest last
};

}  // namespace fluxdeploy
