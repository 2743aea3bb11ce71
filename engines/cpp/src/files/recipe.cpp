#include "files/recipe.hpp"

#include "files/fields.hpp"
#include "files/words.hpp"

namespace fluxdeploy {
namespace {

constexpr std::size_t kMaxLayers = 1 << 14;

void check_quality(const Json& json, const std::string& where) {
    if (json.as<std::nullptr_t>()) return;
    if (!json.as<Json::Object>()) {
        throw FieldError(where, "must be an object or null, not " + shortened(json.text()));
    }
    const Fields fields(json, where, {"cosine", "psnr", "ssim", "least_psnr", "worst_layer"});
    fields.number("cosine");
    for (const char* name : {"psnr", "ssim", "least_psnr", "worst_layer"}) {
        fields.optional_number(name);
    }
}

void check_promise(const Json& json, const std::string& where) {
    const Fields fields(json, where, {"cosine", "psnr", "ssim"});
    for (const char* name : {"cosine", "psnr", "ssim"}) fields.optional_number(name);
}

void check_layers(const Json& json, const std::string& where) {
    const Fields fields(json, where, {"spared", "smoothed"});
    const auto spared = fields.mapping("spared", as_text);
    const auto smoothed = fields.mapping("smoothed", as_number);
    for (const auto& [name, count] :
         {std::pair{"spared", spared.size()}, {"smoothed", smoothed.size()}}) {
        require(count <= kMaxLayers, fields.where(name),
                "has " + std::to_string(count) + " layers; " + std::to_string(kMaxLayers) +
                    " are the most");
    }
    for (const auto& [layer, left] : spared) {
        require(left == "weights" || left == "nothing", join(fields.where("spared"), layer),
                "is " + in_quotes(left) + "; it must be 'weights' or 'nothing'");
    }
    for (const auto& [layer, strength] : smoothed) {
        require(0 < strength && strength < 1, join(fields.where("smoothed"), layer),
                "is " + digits(strength) + "; it must be above 0 and below 1");
    }
}

}  // namespace

void check_recipe(const Json& json, const std::string& where) {
    if (json.as<std::nullptr_t>()) return;
    if (!json.as<Json::Object>()) {
        throw FieldError(where, "must be an object or null, not " + shortened(json.text()));
    }
    const Fields fields(
        json, where, {"precision", "promise", "recipe", "before", "after", "share", "extra_bytes"});
    fields.text("precision");
    check_promise(fields.get("promise"), fields.where("promise"));
    check_layers(fields.get("recipe"), fields.where("recipe"));
    check_quality(fields.get("before"), fields.where("before"));
    check_quality(fields.get("after"), fields.where("after"));
    fields.number("share");
    fields.integer("extra_bytes");
}

}  // namespace fluxdeploy
