#include "text/tokenizer.hpp"

#include <algorithm>
#include <limits>

#include "errors.hpp"
#include "files/json.hpp"
#include "files/utf8.hpp"
#include "text/pipeline.hpp"
#include "text/unsupported.hpp"

namespace fluxdeploy {
namespace {

// Bytes. FLUX.1's have 3 MiB.
constexpr std::size_t kMaxTokenizer = 16 << 20;
constexpr std::size_t kMaxValues = 1'000'000;

[[noreturn]] void refuse(const std::string& source, const std::string& problem) {
    throw Error(ErrorCode::bundle,
                "The tokenizer " + source + " " + problem + ". Build the bundle again.");
}

std::int64_t size_of(const std::vector<std::int64_t>& ids) {
    return static_cast<std::int64_t>(ids.size());
}

}  // namespace

Tokenizer::Tokenizer(std::string name, std::shared_ptr<const Pipeline> pipeline,
                     TokenizerRecord record)
    : name_(std::move(name)), pipeline_(std::move(pipeline)), record_(std::move(record)) {}

Tokenizer Tokenizer::parse(const std::string& name, const std::string& json,
                           const std::string& source, const TokenizerRecord& record) {
    if (json.size() > kMaxTokenizer) {
        refuse(source, "has " + std::to_string(json.size()) + " bytes, and at most " +
                           std::to_string(kMaxTokenizer) + " are allowed");
    }
    try {
        return {name, std::make_shared<const Pipeline>(parse_json(json, kMaxValues)), record};
    } catch (const JsonError& error) {
        refuse(source, std::string("cannot be read: ") + error.what());
    } catch (const Unsupported& error) {
        refuse(source, std::string("cannot be read: ") + error.what());
    }
}

Tokenizer Tokenizer::read(const Bundle& bundle, const std::string& name) {
    const auto found = bundle.manifest.tokenizers.find(name);
    if (found == bundle.manifest.tokenizers.end()) {
        throw Error(ErrorCode::bundle, "The bundle " + bundle.root.string() +
                                           " records no tokenizer " + name + "; build it again.");
    }
    const TokenizerRecord& record = found->second;
    const auto file = std::find_if(record.files.begin(), record.files.end(),
                                   [&](const auto& each) { return each.path == record.path; });
    return parse(name, read_recorded(bundle, *file), bundle.path(record.path).string(), record);
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view prompt, std::int64_t length) const {
    const std::int64_t around = size_of(record_.prefix) + size_of(record_.suffix);
    if (length < around || length > record_.max_length) {
        throw Error(ErrorCode::usage, "The " + name_ + " tokenizer cannot pad to " +
                                          std::to_string(length) + " tokens; choose " +
                                          std::to_string(around) + " to " +
                                          std::to_string(record_.max_length) + ".");
    }
    const std::vector<std::int32_t> content = tokenize(prompt);
    const std::int64_t kept = std::min(length - around, static_cast<std::int64_t>(content.size()));
    const auto first = record_.truncation_side == "left" ? content.end() - kept : content.begin();
    std::vector<std::int32_t> ids;
    ids.reserve(static_cast<std::size_t>(length));
    const auto add = [&](std::int64_t id) { ids.push_back(static_cast<std::int32_t>(id)); };
    const auto pad = [&](bool here) {
        for (std::int64_t i = around + kept; here && i < length; ++i) add(record_.pad_id);
    };
    pad(record_.padding_side == "left");
    std::for_each(record_.prefix.begin(), record_.prefix.end(), add);
    ids.insert(ids.end(), first, first + kept);
    std::for_each(record_.suffix.begin(), record_.suffix.end(), add);
    pad(record_.padding_side != "left");
    return ids;
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view prompt) const {
    return encode(prompt, record_.max_length);
}

std::int64_t Tokenizer::count(std::string_view prompt) const {
    return size_of(record_.prefix) + static_cast<std::int64_t>(tokenize(prompt).size()) +
           size_of(record_.suffix);
}

std::vector<std::int32_t> Tokenizer::tokenize(std::string_view prompt) const {
    const auto text = try_decode_utf8(prompt);
    if (!text) {
        throw Error(ErrorCode::usage,
                    "A prompt is not UTF-8 text; convert it to UTF-8 from what it is encoded in.");
    }
    try {
        const auto ids = pipeline_->encode(*text);
        return {ids.begin(), ids.end()};
    } catch (const Unsupported& error) {
        throw Error(ErrorCode::bundle, "The " + name_ + " tokenizer fails on a prompt: " +
                                           error.what() + ". Build the bundle again.");
    }
}

}  // namespace fluxdeploy
