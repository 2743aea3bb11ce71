// What the command line says, by the names of `fluxdeploy generate`.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

// A command line that cannot be: `what()` says why.
struct UsageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct CommandLine {
    std::string bundle;
    std::vector<std::string> prompts;
    std::optional<std::string> prompt_2;
    std::optional<std::string> negative_prompt;
    std::optional<std::string> negative_prompt_2;
    double true_cfg_scale = 1.0;
    std::optional<std::int64_t> width;
    std::optional<std::int64_t> height;
    std::optional<std::int64_t> steps;
    std::optional<double> guidance;
    // Each makes a picture of each prompt.
    std::vector<std::uint64_t> seeds;
    std::int64_t num_images = 1;
    std::vector<std::string> images;
    std::optional<std::string> mask;
    std::optional<std::int64_t> mask_crop;
    // Left, top, right and bottom, or nothing.
    std::vector<std::int64_t> outpaint;
    std::optional<double> strength;
    // Of several ControlNets, one each, as what follows.
    std::vector<std::string> control_images;
    std::vector<std::int64_t> control_modes;
    std::vector<double> controlnet_scales;
    std::vector<double> control_starts;
    std::vector<double> control_ends;
    std::optional<std::int64_t> max_area;
    bool auto_resize = true;
    std::optional<std::int64_t> max_sequence_length;
    std::string sampler = "euler";
    // The steps, or whether they are those of the bundle's record.
    std::vector<std::int64_t> skip;
    bool skip_recorded = false;
    std::string runtime = "auto";
    std::optional<std::string> library;
    std::int64_t device = 0;
    std::optional<std::int64_t> threads;
    bool low_vram = false;
    std::string out = "image.png";
    bool json = false;
    bool check = false;
    bool help = false;
    bool version = false;
};

// Raises `UsageError`.
CommandLine parse(int count, char** words);

// What `--help` prints.
std::string help();
