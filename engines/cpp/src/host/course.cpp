#include "host/course.hpp"

#include "arguments.hpp"
#include "errors.hpp"
#include "files/words.hpp"
#include "sampling/schedule.hpp"

namespace fluxdeploy {
namespace {

const SkipRecord& recorded(const Manifest& manifest, const std::string& sampler,
                           std::int64_t steps) {
    std::string known;
    for (const SkipRecord& record : manifest.skips) {
        if (record.sampler == sampler && record.num_inference_steps == steps) return record;
        known += (known.empty() ? "" : ", ") + std::to_string(record.num_inference_steps) +
                 " steps of " + in_quotes(record.sampler);
    }
    throw Error(ErrorCode::usage, "This bundle has no steps to skip for " + std::to_string(steps) +
                                      " steps of " + in_quotes(sampler) + "; it has " +
                                      (known.empty() ? "none at all" : "those for " + known) +
                                      ". Find some with `fluxdeploy tune`, or leave out `skip`.");
}

}  // namespace

std::vector<float> check_sigmas(const Arguments& arguments) {
    const std::vector<float>& levels = arguments.sigmas;
    const auto refuse = [](const std::string& message) {
        throw Error(ErrorCode::usage, "`sigmas` has " + message);
    };
    const std::string count = std::to_string(levels.size());
    if (static_cast<std::int64_t>(levels.size()) > kMaxSteps) {
        refuse(count + " noise levels; it must have at most " + std::to_string(kMaxSteps) + ".");
    }
    for (std::size_t step = 0; step < levels.size(); ++step) {
        const float level = levels[step];
        const std::string place = general(level) + " for step " + std::to_string(step);
        if (!(0 < level && level <= 1)) {
            refuse(place + "; noise levels are above 0, and at most 1." +
                   (level == 0 ? " The 0 at the end is put there by itself; leave it out." : ""));
        }
        if (step > 0 && !(level < levels[step - 1])) {
            refuse(place + ", after " + general(levels[step - 1]) +
                   "; each noise level must be below the one before, from noise to picture.");
        }
    }
    const auto& steps = arguments.num_inference_steps;
    if (!levels.empty() && steps && *steps != static_cast<std::int64_t>(levels.size())) {
        refuse(count + " noise levels, and `num_inference_steps` is " + std::to_string(*steps) +
               ". Leave out one of them: a step has a level.");
    }
    return levels;
}

Skips check_skip(const Manifest& manifest, const Arguments& arguments, std::int64_t steps) {
    if (!arguments.skip_recorded && arguments.skip.empty()) return {};
    if (!find_sampler(arguments.sampler).one_a_step) {
        throw Error(ErrorCode::usage, "Steps cannot be skipped with the sampler " +
                                          in_quotes(arguments.sampler) +
                                          ", which evaluates the velocity several times a step. "
                                          "Leave out `skip`, or use 'euler'.");
    }
    if (arguments.skip_recorded) {
        if (!arguments.sigmas.empty()) {
            throw Error(ErrorCode::usage,
                        "`skip` cannot be 'auto' beside `sigmas`: what was measured are the "
                        "bundle's own noise levels. Leave out one of them.");
        }
        const SkipRecord& record = recorded(manifest, arguments.sampler, steps);
        return {{record.steps.begin(), record.steps.end()}, record.order};
    }
    for (const std::int64_t step : arguments.skip) {
        if (0 < step && step < steps) continue;
        throw Error(ErrorCode::usage,
                    "`skip` has the step " + std::to_string(step) + "; of " +
                        std::to_string(steps) + " steps, 1 to " + std::to_string(steps - 1) +
                        " can be skipped." +
                        (step == 0 ? " The first step has none before it to go on from." : ""));
    }
    return {{arguments.skip.begin(), arguments.skip.end()}, 1};
}

std::vector<std::string> unmeasured(const Manifest& manifest, const Request& request) {
    const SkipRecord& record = recorded(manifest, request.sampler, request.num_inference_steps);
    if (record.height == request.height && record.width == request.width) return {};
    return {"The skipped steps were measured at " + std::to_string(record.width) + "x" +
            std::to_string(record.height) + "; what they keep of pictures of " +
            std::to_string(request.width) + "x" + std::to_string(request.height) + " was not."};
}

}  // namespace fluxdeploy
