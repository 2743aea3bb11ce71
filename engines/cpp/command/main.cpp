// fluxdeploy-cpp: pictures from prompts, by the library's public header alone.
#include <fluxdeploy/fluxdeploy.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <set>

#include "options.hpp"

namespace {

namespace fs = std::filesystem;
using fluxdeploy::Error;

fluxdeploy_cancel* interrupted = nullptr;

extern "C" void on_interrupt(int) { fluxdeploy_cancel_now(interrupted); }

// A number as Python writes it: 3.0.
std::string in_digits(double value) {
    char digits[64];
    std::string text(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
    return text.find_first_not_of("-0123456789") == std::string::npos ? text + ".0" : text;
}

template <class Number>
std::string joined(const std::vector<Number>& numbers, const char* between = ",") {
    std::string text;
    for (const Number number : numbers) {
        text += (text.empty() ? "" : between) + std::to_string(number);
    }
    return text;
}

std::string json_text(const std::string& text) {
    std::string quoted = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            quoted += std::string("\\") + c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
            quoted += escaped;
        } else {
            quoted += c;
        }
    }
    return quoted + "\"";
}

std::string json_list(const std::vector<std::string>& texts) {
    std::string list = "[";
    for (const auto& text : texts) list += (list.size() > 1 ? ", " : "") + json_text(text);
    return list + "]";
}

// image.png itself for one picture, else image-0.png, image-1.png, ...; with several seeds, of
// which each makes `each` pictures, image-0-seed7.png, ...
std::vector<std::string> picture_paths(const std::string& out, std::size_t count,
                                       const std::vector<std::uint64_t>& seeds, std::size_t each) {
    const fs::path path(out);
    std::string suffix = path.extension().string();
    for (char& c : suffix) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    if (suffix != ".png") {
        throw UsageError(out +
                         " is no name for a picture: only PNG files are written, since they carry "
                         "the prompt and the seed. End the name in .png.");
    }
    const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
    if (!fs::is_directory(folder)) {
        throw UsageError("--out is in " + folder.string() +
                         ", which is not a folder. Make it first.");
    }
    if (::access(folder.c_str(), W_OK | X_OK) != 0) {
        throw Error(FLUXDEPLOY_INTERNAL, "Cannot write into " + folder.string() +
                                             ": permission is denied. Choose another folder.");
    }
    std::vector<std::string> paths;
    for (std::size_t index = 0; index < count; ++index) {
        fs::path own = path;
        if (count > 1) {
            const std::string end =
                seeds.size() > 1 ? "-seed" + std::to_string(seeds[index / each % seeds.size()])
                                 : "";
            own.replace_filename(path.stem().string() + "-" + std::to_string(index) + end +
                                 path.extension().string());
        }
        if (fs::is_directory(own)) {
            throw UsageError("--out " + own.string() + " is a folder. Name a PNG file in it.");
        }
        paths.push_back(own.string());
    }
    return paths;
}

fluxdeploy::Options pipeline_options(const CommandLine& line) {
    fluxdeploy::Options options;
    options.runtime = line.runtime;
    options.threads = line.threads;
    options.device = line.device;
    options.low_vram = line.low_vram;
    if (line.library) {
        options.libraries.emplace_back(line.runtime == "auto" ? "onnxruntime" : line.runtime,
                                       *line.library);
    }
    return options;
}

// What is written into each PNG, under the names of docs/bundle.md.
struct Written {
    std::vector<std::pair<std::string, std::string>> chunks;
    void add(const char* keyword, const std::string& text) { chunks.emplace_back(keyword, text); }
};

void check(const fluxdeploy::Pipeline& pipeline) {
    const auto print = [](void*, const char* component, double max_error, double cosine) {
        std::printf("%s: off by %.2g of its range, cosine %.6f\n", component, max_error, cosine);
    };
    fluxdeploy::detail::checked([&](fluxdeploy_error** error) {
        return fluxdeploy_pipeline_check(pipeline.handle(), print, nullptr, error);
    });
}

using Picture = fluxdeploy::detail::Handle<fluxdeploy_picture, fluxdeploy_picture_free>;

Picture read_picture(const std::string& path) {
    fluxdeploy_picture* read = nullptr;
    fluxdeploy::detail::checked([&](fluxdeploy_error** error) {
        return fluxdeploy_picture_read(path.c_str(), &read, error);
    });
    return Picture(read);
}

fluxdeploy::Image copied(const fluxdeploy_picture& picture, const std::uint8_t* rgb) {
    const std::int64_t width = fluxdeploy_picture_width(&picture);
    const std::int64_t height = fluxdeploy_picture_height(&picture);
    return {width, height, {rgb, rgb + width * height * 3}};
}

// Each of several ControlNets takes one of the pictures, and a single one all of them.
void share_controls(std::vector<fluxdeploy::Image> controls, std::int64_t controlnets,
                    fluxdeploy::Request& request) {
    if (controlnets < 2) {
        request.control_images = std::move(controls);
        return;
    }
    for (fluxdeploy::Image& control : controls) {
        if (request.control_images.empty()) {
            request.control_images.push_back(std::move(control));
        } else {
            request.more_control_images.push_back({std::move(control)});
        }
    }
}

void generate(const CommandLine& line, const fluxdeploy::CancelToken& cancel) {
    const auto began = std::chrono::steady_clock::now();
    const auto each = static_cast<std::size_t>(std::max<std::int64_t>(line.num_images, 1));
    const std::size_t count =
        line.prompts.size() * std::max<std::size_t>(line.seeds.size(), 1) * each;
    const std::vector<std::string> paths = picture_paths(line.out, count, line.seeds, each);

    fluxdeploy::Request request;
    std::string image_sha256, mask_sha256, control_sha256;
    for (const std::string& path : line.images) {
        const Picture image = read_picture(path);
        request.images.push_back(copied(*image, fluxdeploy_picture_rgb(image.get())));
        image_sha256 += (image_sha256.empty() ? "" : ",");
        image_sha256 += fluxdeploy_picture_sha256(image.get());
    }
    if (line.images.size() > 1) {
        request.references = static_cast<std::int64_t>(line.images.size());
    }
    std::vector<fluxdeploy::Image> controls;
    for (const std::string& path : line.control_images) {
        const Picture control = read_picture(path);
        controls.push_back(copied(*control, fluxdeploy_picture_rgb(control.get())));
        control_sha256 += (control_sha256.empty() ? "" : ",");
        control_sha256 += fluxdeploy_picture_sha256(control.get());
    }
    request.control_mode = line.control_modes;
    request.controlnet_conditioning_scale = line.controlnet_scales;
    request.control_guidance_start = line.control_starts;
    request.control_guidance_end = line.control_ends;
    request.max_area = line.max_area;
    request.auto_resize = line.auto_resize;
    if (line.mask) {
        const Picture mask = read_picture(*line.mask);
        request.mask_images.push_back(copied(*mask, fluxdeploy_picture_mask(mask.get())));
        mask_sha256 = fluxdeploy_picture_sha256(mask.get());
    }
    request.width = line.width;
    request.height = line.height;
    if (!line.outpaint.empty()) {
        if (line.images.size() != 1 || line.mask) {
            throw UsageError("--outpaint needs one --image, and makes the mask: leave out --mask.");
        }
        const auto& sides = line.outpaint;
        auto [canvas, margins] = fluxdeploy::outpaint_canvas(request.images.front(), sides[0],
                                                             sides[1], sides[2], sides[3]);
        request.width = line.width.value_or(canvas.width);
        request.height = line.height.value_or(canvas.height);
        request.images = {std::move(canvas)};
        request.mask_images = {std::move(margins)};
    }
    if (line.prompt_2) request.prompts_2 = {*line.prompt_2};
    if (line.negative_prompt) request.negative_prompts = {*line.negative_prompt};
    if (line.negative_prompt_2) request.negative_prompts_2 = {*line.negative_prompt_2};
    request.true_cfg_scale = line.true_cfg_scale;
    request.num_inference_steps = line.steps;
    request.guidance_scale = line.guidance;
    request.num_images_per_prompt = line.num_images;
    request.strength = line.strength;
    request.padding_mask_crop = line.mask_crop;
    request.max_sequence_length = line.max_sequence_length;
    request.sampler = line.sampler;
    request.skip = line.skip;
    request.skip_recorded = line.skip_recorded;
    request.cancel = cancel;
    const bool shown = !line.json && ::isatty(2) != 0;
    request.on_step_end = [shown](const fluxdeploy_step& step) {
        if (shown) {
            std::fprintf(stderr, "\rGenerating: step %lld of %lld ",
                         static_cast<long long>(step.step), static_cast<long long>(step.total));
        }
        return true;
    };

    fluxdeploy::Pipeline pipeline(line.bundle, pipeline_options(line));
    share_controls(std::move(controls), fluxdeploy_pipeline_controlnets(pipeline.handle()),
                   request);
    const auto by_default = [&](const char* name) {
        return fluxdeploy_pipeline_default(pipeline.handle(), name);
    };
    const std::int64_t steps =
        line.steps.value_or(static_cast<std::int64_t>(by_default("num_inference_steps")));
    std::vector<fluxdeploy::Image> images;
    std::vector<std::string> captions, warnings;
    std::set<std::string> told;
    // Of each picture; one that the system draws is that of all.
    std::vector<std::uint64_t> seeds;
    std::int64_t made = 0;
    const auto draw = [&](const std::string& prompt) {
        request.prompts = {prompt};
        fluxdeploy::Result result = pipeline.generate(request);
        request.seed = result.seed;
        made = result.steps;
        for (auto& image : result.images) {
            images.push_back(std::move(image));
            captions.push_back(prompt);
            seeds.push_back(*result.seed);
        }
        for (const std::string& notice : result.notices) {
            if (!told.insert(notice).second) continue;
            warnings.push_back(notice);
            std::fprintf(stderr, "%sWarning: %s\n", shown ? "\r\033[K" : "", notice.c_str());
        }
    };
    for (const std::string& prompt : line.prompts) {
        for (const std::uint64_t seed : line.seeds) {
            request.seed = seed;
            draw(prompt);
        }
        if (line.seeds.empty()) draw(prompt);
    }
    if (shown) std::fprintf(stderr, "\r\033[K");
    // What is drawn after a reference has its size, and no strength.
    const bool follows =
        !line.images.empty() && fluxdeploy_pipeline_does(pipeline.handle(), "kontext") != 0;
    for (std::size_t number = 0; number < images.size(); ++number) {
        Written text;
        text.add("prompt", captions[number]);
        if (line.prompt_2) text.add("prompt_2", *line.prompt_2);
        if (line.negative_prompt) text.add("negative_prompt", *line.negative_prompt);
        if (line.negative_prompt_2) text.add("negative_prompt_2", *line.negative_prompt_2);
        text.add("true_cfg_scale", in_digits(line.true_cfg_scale));
        text.add("seed", std::to_string(seeds[number]));
        text.add("index", std::to_string(number % each));
        text.add("num_inference_steps", std::to_string(steps));
        text.add("guidance_scale", in_digits(line.guidance.value_or(by_default("guidance_scale"))));
        if (line.sampler != "euler") text.add("sampler", line.sampler);
        if (line.skip_recorded || !line.skip.empty()) {
            text.add("skip", line.skip_recorded ? "auto" : joined(line.skip));
        }
        text.add("max_sequence_length",
                 std::to_string(line.max_sequence_length.value_or(
                     static_cast<std::int64_t>(by_default("max_sequence_length")))));
        const auto side = [&](const char* name, std::optional<std::int64_t> asked,
                              std::int64_t drawn) {
            const std::int64_t usual = static_cast<std::int64_t>(by_default(name));
            text.add(name, std::to_string(asked.value_or(follows ? drawn : usual)));
        };
        side("height", request.height, images[number].height);
        side("width", request.width, images[number].width);
        if (!line.images.empty()) {
            if (!follows) {
                text.add("strength", in_digits(line.strength.value_or(by_default("strength"))));
            }
            text.add("image_sha256", image_sha256);
            if (line.mask) text.add("mask_sha256", mask_sha256);
            if (line.mask_crop && !request.mask_images.empty()) {
                text.add("padding_mask_crop", std::to_string(*line.mask_crop));
            }
            if (!line.outpaint.empty()) text.add("outpaint", joined(line.outpaint));
        }
        if (!line.control_images.empty()) text.add("control_sha256", control_sha256);
        const auto add_numbers = [&](const char* keyword, const std::vector<double>& numbers) {
            std::string all;
            for (const double number : numbers) {
                all += (all.empty() ? "" : ",") + in_digits(number);
            }
            if (!all.empty()) text.add(keyword, all);
        };
        if (!line.control_modes.empty()) text.add("control_mode", joined(line.control_modes));
        add_numbers("controlnet_conditioning_scale", line.controlnet_scales);
        add_numbers("control_guidance_start", line.control_starts);
        add_numbers("control_guidance_end", line.control_ends);
        if (line.max_area) text.add("max_area", std::to_string(*line.max_area));
        if (!line.auto_resize) text.add("auto_resize", "no");
        text.add("bundle_hash", pipeline.bundle_hash());
        text.add("fluxdeploy_version", fluxdeploy_version());
        fluxdeploy::write_png(paths[number], images[number], text.chunks);
    }
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    const auto& first = images.front();
    std::vector<std::uint64_t> different;
    for (const std::uint64_t seed : seeds) {
        if (std::find(different.begin(), different.end(), seed) == different.end()) {
            different.push_back(seed);
        }
    }
    if (line.json) {
        std::printf(
            "{\"paths\": %s, \"prompts\": %s, \"sheet\": null, \"seed\": %s, \"seeds\": [%s], "
            "\"width\": %lld, \"height\": %lld, \"steps\": %lld, \"seconds\": %.3f, \"warnings\": "
            "%s}\n",
            json_list(paths).c_str(), json_list(captions).c_str(),
            different.size() > 1 ? "null" : joined(different).c_str(), joined(seeds, ", ").c_str(),
            static_cast<long long>(first.width), static_cast<long long>(first.height),
            static_cast<long long>(steps), seconds, json_list(warnings).c_str());
        return;
    }
    for (const std::string& path : paths) std::printf("%s\n", path.c_str());
    const std::string counted = !line.images.empty()
                                    ? std::to_string(made) + " of " + std::to_string(steps)
                                    : std::to_string(steps);
    std::fprintf(stderr, "%lldx%lld, seed %s, %s steps, %.1f s\n",
                 static_cast<long long>(first.width), static_cast<long long>(first.height),
                 joined(different, ", ").c_str(), counted.c_str(), seconds);
}

}  // namespace

int main(int count, char** words) {
    // Before ONNX Runtime is loaded, which sends and keeps telemetry unless it is told not to.
    ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);
    try {
        const CommandLine line = parse(count, words);
        if (line.help) {
            std::fputs(help().c_str(), stdout);
            return 0;
        }
        if (line.version) {
            std::printf("fluxdeploy-cpp %s\n", fluxdeploy_version());
            return 0;
        }
        const fluxdeploy::CancelToken cancel;
        interrupted = cancel.handle();
        std::signal(SIGINT, on_interrupt);
        if (line.check) {
            check(fluxdeploy::Pipeline(line.bundle, pipeline_options(line)));
        } else {
            generate(line, cancel);
        }
        return 0;
    } catch (const UsageError& error) {
        std::fprintf(stderr, "Error: %s\n", error.what());
        return 2;
    } catch (const Error& error) {
        std::fprintf(stderr, "Error: %s\n", error.what());
        if (error.code() == FLUXDEPLOY_CANCELLED) return 130;
        return error.code() == FLUXDEPLOY_USAGE ? 2 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "Error: %s\n", error.what());
        return 1;
    }
}
