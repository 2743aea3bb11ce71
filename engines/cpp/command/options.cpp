#include "options.hpp"

#include <charconv>
#include <functional>
#include <regex>

namespace {

// An option: what its value is called, empty where it has none.
struct Option {
    const char* name;
    const char* value;
    const char* help;
    std::function<void(CommandLine&, const std::string&)> set;
};

// All of a text as a number.
template <class Number>
Number number(const std::string& name, const std::string& text, const char* kind) {
    Number value{};
    const auto end = std::from_chars(text.data(), text.data() + text.size(), value);
    if (end.ec != std::errc() || end.ptr != text.data() + text.size()) {
        throw UsageError("Invalid value for '" + name + "': '" + text + "' is not a valid " + kind +
                         ".");
    }
    return value;
}

std::int64_t integer(const std::string& name, const std::string& text) {
    return number<std::int64_t>(name, text, "integer");
}

double decimal(const std::string& name, const std::string& text) {
    return number<double>(name, text, "float");
}

std::int64_t pixels(const std::string& text) {
    const std::int64_t value = integer("--mask-crop", text);
    if (value >= 0) return value;
    throw UsageError("Invalid value for '--mask-crop': " + text + " is not in the range x>=0.");
}

// Four numbers of at most five digits.
std::vector<std::int64_t> margins(const std::string& text) {
    static const std::regex form(
        R"(\s*(\d{1,5})\s*,\s*(\d{1,5})\s*,\s*(\d{1,5})\s*,\s*(\d{1,5})\s*)");
    std::smatch found;
    if (!std::regex_match(text, found, form)) {
        throw UsageError("Invalid value for '--outpaint': '" + text +
                         "' is not LEFT,TOP,RIGHT,BOTTOM in pixels, such as 64,0,64,0.");
    }
    std::vector<std::int64_t> sides;
    for (std::size_t i = 1; i < found.size(); ++i) sides.push_back(std::stoll(found[i]));
    return sides;
}

// Numbers of at most thirty digits, of which each must be a seed.
void set_seeds(CommandLine& line, const std::string& text) {
    static const std::regex form(R"(\s*-?\d{1,30}\s*(,\s*\d{1,30}\s*)*)");
    if (!std::regex_match(text, form)) {
        throw UsageError("Invalid value for '--seed': '" + text +
                         "' is not a seed, such as 7, or several, such as 1,2,3.");
    }
    line.seeds.clear();
    static const std::regex digits(R"(-?\d+)");
    for (std::sregex_iterator at(text.begin(), text.end(), digits), end; at != end; ++at) {
        const std::string word = at->str();
        std::uint64_t seed = 0;
        const auto read = std::from_chars(word.data(), word.data() + word.size(), seed);
        if (read.ec != std::errc() || word.front() == '-') {
            throw UsageError("The seed " + word +
                             " is out of range. Seeds go from 0 to 2^64 - 1; leave it out to have "
                             "one drawn.");
        }
        line.seeds.push_back(seed);
    }
}

// `none`, `auto`, or numbers of steps, of at most five digits each.
void set_skip(CommandLine& line, const std::string& text) {
    static const std::regex form(R"(\s*(none|auto|\d{1,5}(\s*,\s*\d{1,5})*)\s*)");
    std::smatch found;
    if (!std::regex_match(text, found, form)) {
        throw UsageError("Invalid value for '--skip': '" + text +
                         "' is not none, auto or steps such as 3,5,7.");
    }
    line.skip.clear();
    line.skip_recorded = found[1] == "auto";
    static const std::regex digits(R"(\d+)");
    for (std::sregex_iterator at(text.begin(), text.end(), digits), end; at != end; ++at) {
        line.skip.push_back(std::stoll(at->str()));
    }
}

const std::vector<Option>& options() {
    static const std::vector<Option> all{
        {"--prompt-2", "TEXT", "What T5 reads instead of PROMPT, which is then CLIP's alone.",
         [](auto& line, const auto& text) { line.prompt_2 = text; }},
        {"--negative-prompt", "TEXT", "What to steer away from; needs --true-cfg-scale.",
         [](auto& line, const auto& text) { line.negative_prompt = text; }},
        {"--negative-prompt-2", "TEXT", "What T5 reads instead of --negative-prompt.",
         [](auto& line, const auto& text) { line.negative_prompt_2 = text; }},
        {"--true-cfg-scale", "FLOAT",
         "Strength of the negative prompt; above 1 each step costs twice.",
         [](auto& line, const auto& text) {
             line.true_cfg_scale = decimal("--true-cfg-scale", text);
         }},
        {"--width", "INTEGER", "Pixels, a multiple of 16.  [default: the bundle's]",
         [](auto& line, const auto& text) { line.width = integer("--width", text); }},
        {"--height", "INTEGER", "Pixels, a multiple of 16.  [default: the bundle's]",
         [](auto& line, const auto& text) { line.height = integer("--height", text); }},
        {"--steps", "INTEGER", "Denoising steps.  [default: the bundle's]",
         [](auto& line, const auto& text) { line.steps = integer("--steps", text); }},
        {"--guidance", "FLOAT", "Guidance scale of models with a guidance embedding.",
         [](auto& line, const auto& text) { line.guidance = decimal("--guidance", text); }},
        {"--seed", "SEED[,SEED...]",
         "The same seed gives the same picture; several give one each.  [default: a random one]",
         set_seeds},
        {"--num-images", "INTEGER", "Pictures of each prompt and seed.",
         [](auto& line, const auto& text) { line.num_images = integer("--num-images", text); }},
        {"--image", "PATH",
         "A PNG to start from, resized to width x height; for a Kontext bundle what to change, "
         "or several.",
         [](auto& line, const auto& text) { line.images.push_back(text); }},
        {"--mask", "PATH", "A PNG: what of --image to redraw, where it is white or transparent.",
         [](auto& line, const auto& text) { line.mask = text; }},
        {"--mask-crop", "PIXELS",
         "Draw only the part around --mask, with so many pixels more on each side.",
         [](auto& line, const auto& text) { line.mask_crop = pixels(text); }},
        {"--outpaint", "LEFT,TOP,RIGHT,BOTTOM", "Draw so many pixels more on the sides of --image.",
         [](auto& line, const auto& text) { line.outpaint = margins(text); }},
        {"--strength", "FLOAT", "How much of --image becomes noise, 0 to 1.",
         [](auto& line, const auto& text) { line.strength = decimal("--strength", text); }},
        {"--control-image", "PATH",
         "A PNG for a Canny or Depth bundle, or one with a ControlNet: what to draw along. Once "
         "for each of several ControlNets, as the next four options.",
         [](auto& line, const auto& text) { line.control_images.push_back(text); }},
        {"--control-mode", "N", "The kind of control, for a ControlNet that tells several apart.",
         [](auto& line, const auto& text) {
             line.control_modes.push_back(integer("--control-mode", text));
         }},
        {"--controlnet-scale", "FLOAT", "How much a ControlNet counts.  [default: 1]",
         [](auto& line, const auto& text) {
             line.controlnet_scales.push_back(decimal("--controlnet-scale", text));
         }},
        {"--control-start", "FLOAT",
         "The part of the steps, 0 to 1, after which a ControlNet counts.  [default: 0]",
         [](auto& line, const auto& text) {
             line.control_starts.push_back(decimal("--control-start", text));
         }},
        {"--control-end", "FLOAT",
         "The part of the steps, 0 to 1, after which it no longer does.  [default: 1]",
         [](auto& line, const auto& text) {
             line.control_ends.push_back(decimal("--control-end", text));
         }},
        {"--max-area", "PIXELS", "For a Kontext bundle: draw so many pixels.",
         [](auto& line, const auto& text) { line.max_area = integer("--max-area", text); }},
        {"--no-auto-resize", "", "Leave --image of a Kontext bundle in its own size.",
         [](auto& line, const auto&) { line.auto_resize = false; }},
        {"--max-sequence-length", "INTEGER", "T5 tokens that the prompt is padded or cut to.",
         [](auto& line, const auto& text) {
             line.max_sequence_length = integer("--max-sequence-length", text);
         }},
        {"--sampler", "NAME",
         "How steps use the velocity: euler, ab2, dpmpp_2m, heun, midpoint or rk4.",
         [](auto& line, const auto& text) { line.sampler = text; }},
        {"--skip", "none|auto|STEP,...", "Steps in which the transformer does not run.", set_skip},
        {"--runtime", "NAME", "What runs the engines.  [default: auto]",
         [](auto& line, const auto& text) { line.runtime = text; }},
        {"--library", "PATH", "The shared library of --runtime, or of ONNX Runtime.",
         [](auto& line, const auto& text) { line.library = text; }},
        {"--device", "INTEGER", "The GPU, by its index.",
         [](auto& line, const auto& text) { line.device = integer("--device", text); }},
        {"--threads", "INTEGER", "CPU threads.  [default: the runtime's choice]",
         [](auto& line, const auto& text) { line.threads = integer("--threads", text); }},
        {"--low-vram", "", "Open each engine only while it is needed.",
         [](auto& line, const auto&) { line.low_vram = true; }},
        {"--out", "PATH", "A PNG; several pictures become image-0.png, image-1.png, ...",
         [](auto& line, const auto& text) { line.out = text; }},
        {"--json", "", "Print one JSON object.", [](auto& line, const auto&) { line.json = true; }},
        {"--check", "", "Make no picture: hold each engine against its golden tensors.",
         [](auto& line, const auto&) { line.check = true; }},
        {"--version", "", "Print the version.",
         [](auto& line, const auto&) { line.version = true; }},
        {"--help", "", "Print this.", [](auto& line, const auto&) { line.help = true; }},
    };
    return all;
}

const Option& find(const std::string& name) {
    for (const Option& option : options()) {
        if (name == option.name || (name == "-o" && std::string(option.name) == "--out")) {
            return option;
        }
    }
    throw UsageError("No such option: " + name);
}

}  // namespace

CommandLine parse(int count, char** words) {
    CommandLine line;
    std::vector<std::string> rest;
    bool only_words = false;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (only_words || word.size() < 2 || word[0] != '-') {
            rest.push_back(word);
            continue;
        }
        if (word == "--") {
            only_words = true;
            continue;
        }
        const auto equals = word.rfind("--", 0) == 0 ? word.find('=') : std::string::npos;
        const Option& option = find(word.substr(0, equals));
        std::string value;
        if (*option.value != '\0') {
            if (equals != std::string::npos) {
                value = word.substr(equals + 1);
            } else if (++i < count) {
                value = words[i];
            } else {
                throw UsageError("Option '" + word + "' requires an argument.");
            }
        } else if (equals != std::string::npos) {
            throw UsageError("Option '" + word.substr(0, equals) + "' does not take a value.");
        }
        option.set(line, value);
    }
    if (line.help || line.version) return line;
    if (rest.empty()) throw UsageError("Missing argument 'BUNDLE'.");
    line.bundle = rest.front();
    line.prompts.assign(rest.begin() + 1, rest.end());
    if (line.prompts.empty() && !line.check) throw UsageError("Missing argument 'PROMPT...'.");
    return line;
}

std::string help() {
    std::string text =
        "Usage: fluxdeploy-cpp [OPTIONS] BUNDLE PROMPT...\n\n"
        "  Make a picture of each PROMPT from the bundle in the folder BUNDLE, as `fluxdeploy\n"
        "  generate` does: the same seed and options give the same picture.\n\nOptions:\n";
    for (const Option& option : options()) {
        std::string names =
            std::string("  ") + (std::string(option.name) == "--out" ? "-o, " : "") + option.name;
        if (*option.value != '\0') names += std::string(" ") + option.value;
        names.resize(std::max<std::size_t>(names.size() + 2, 32), ' ');
        text += names + option.help + "\n";
    }
    return text;
}
