#include "text/pipeline.hpp"

#include "files/utf8.hpp"
#include "text/format.hpp"
#include "text/unsupported.hpp"

namespace fluxdeploy {
namespace {

constexpr const char* kWhat = "its document";

const Json& checked(const Json& json) {
    if (!json.as<Json::Object>()) throw Unsupported("it is not an object");
    if (text_member(json, kWhat, "version") != "1.0") {
        throw Unsupported("its version is not 1.0");
    }
    for (const char* name : {"truncation", "padding"}) {
        // The manifest says how long prompts are.
        if (!is_absent(json, name)) throw Unsupported(std::string("it has a ") + name);
    }
    return json;
}

const Json& part(const Json& json, const char* name) {
    static const Json nothing{nullptr};
    const Json* found = json.find(name);
    return found ? *found : nothing;
}

const Json::Array& added_tokens(const Json& json) {
    static const Json::Array none;
    return json.find("added_tokens") ? list_member(json, kWhat, "added_tokens") : none;
}

// Refuse a template that would have the text itself twice, or not at all.
void check_post_processor(const Json& json) {
    if (json.as<std::nullptr_t>()) return;
    const std::string type = text_member(json, "its post_processor", "type");
    if (type == "Sequence") {
        for (const auto& step : list_member(json, "its post_processor", "processors")) {
            check_post_processor(step);
        }
    } else if (type == "TemplateProcessing") {
        int texts = 0;
        for (const auto& piece : list_member(json, "its post_processor", "single")) {
            texts += piece.find("Sequence") ? 1 : 0;
        }
        if (texts != 1) throw Unsupported("its post_processor does not have the text once");
    } else if (type != "RobertaProcessing" && type != "BertProcessing" && type != "ByteLevel") {
        throw Unsupported("its post_processor " + type + " is not known here");
    }
}

}  // namespace

Pipeline::Pipeline(const Json& json)
    : normalizer_(read_normalizer(part(checked(json), "normalizer"))),
      pre_tokenizer_(read_pre_tokenizer(part(json, "pre_tokenizer"))),
      model_(read_model(member(json, kWhat, "model"))),
      added_(added_tokens(json), *model_, normalizer_) {
    check_post_processor(part(json, "post_processor"));
}

std::vector<std::uint32_t> Pipeline::encode(const std::u32string& text) const {
    std::vector<std::uint32_t> ids;
    for (auto& part : added_.split(text, normalizer_)) {
        if (part.id) {
            ids.push_back(*part.id);
            continue;
        }
        for (const auto& piece : pre_tokenizer_(std::move(part.text))) {
            model_->encode(encode_utf8(piece), ids);
        }
    }
    return ids;
}

}  // namespace fluxdeploy
