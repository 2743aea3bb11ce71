// How noise levels are spread between the first and the last, after shifting.
#pragma once

#include <string>
#include <vector>

namespace fluxdeploy {

// As many levels, from the first to the last of these. `spacing` is "karras", equation 5 of arXiv
// 2206.00364 with rho 7; "exponential", even steps of the logarithm; or "beta", the quantiles of
// the beta distribution with parameters 0.6 and 0.6 (arXiv 2407.12173).
std::vector<float> spaced(const std::string& spacing, const std::vector<float>& levels);

}  // namespace fluxdeploy
