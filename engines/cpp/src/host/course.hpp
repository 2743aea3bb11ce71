// Which steps of a call are skipped.
#pragma once

#include <string>
#include <vector>

#include "host/request.hpp"

namespace fluxdeploy {

// The caller's noise levels before shifting: below each other, in (0, 1]; none where there are
// none. Raises `Error` (usage) for others, and where their number is not that of the steps asked
// for.
std::vector<float> check_sigmas(const Arguments& arguments);

// The steps that a call skips, of `steps` with the sampler of that name; none where it asks for
// none. Raises `Error` (usage) for steps that are none, for a sampler that takes several velocities
// a step, and where the manifest has no record of such a call though it is asked for.
Skips check_skip(const Manifest& manifest, const Arguments& arguments, std::int64_t steps);

// A sentence where the recorded skips of a request were measured with pictures of another size.
std::vector<std::string> unmeasured(const Manifest& manifest, const Request& request);

}  // namespace fluxdeploy
