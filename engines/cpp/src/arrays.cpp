#include "arrays.hpp"

namespace fluxdeploy {

bool all_finite(const float* values, std::int64_t count) {
    // 0 * x is 0 for a finite number and NaN for any other, and NaN stays in a sum.
    float sum = 0;
    for (std::int64_t i = 0; i < count; ++i) sum += 0.0f * values[i];
    return sum == 0.0f;
}

}  // namespace fluxdeploy
