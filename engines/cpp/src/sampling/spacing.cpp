#include "sampling/spacing.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace fluxdeploy {
namespace {

constexpr double kRho = 7;
constexpr double kAlpha = 0.6;
// Of the series, which has halves to the power of their number.
constexpr int kTerms = 80;

// `count` numbers from `first` to `last`, in even steps.
std::vector<double> even(double first, double last, std::size_t count) {
    std::vector<double> numbers(count, first);
    const double step = count > 1 ? (last - first) / static_cast<double>(count - 1) : 0;
    for (std::size_t i = 0; i < count; ++i) numbers[i] = static_cast<double>(i) * step + first;
    if (count > 1) numbers.back() = last;
    return numbers;
}

// The integral of t^-0.4 (1 - t)^-0.4 from 0 to x, divided by x^0.6.
double series(double x) {
    double total = 1 / kAlpha, factor = 1;
    for (int n = 1; n < kTerms; ++n) {
        factor = factor * x * (n - kAlpha) / n;
        total += factor / (kAlpha + n);
    }
    return total;
}

// Where the beta distribution reaches a share.
double beta_quantile(double share) {
    // Symmetric about a half: the lower half has the series that converges.
    const double below = std::min(share, 1 - share);
    const double whole = std::tgamma(kAlpha) * std::tgamma(kAlpha) / std::tgamma(2 * kAlpha);
    // In y = x^0.6, from which the integral is almost a line.
    double low = 0, high = std::pow(0.5, kAlpha);
    for (int i = 0; i < 64; ++i) {
        const double middle = (low + high) / 2;
        const bool less = middle * series(std::pow(middle, 1 / kAlpha)) < below * whole;
        (less ? low : high) = middle;
    }
    // The ends are exact.
    const double found = below == 0 ? 0 : std::pow((low + high) / 2, 1 / kAlpha);
    return share <= 0.5 ? found : 1 - found;
}

}  // namespace

std::vector<float> spaced(const std::string& spacing, const std::vector<float>& levels) {
    const double first = levels.front(), last = levels.back();
    const bool exponential = spacing == "exponential";
    std::vector<float> found;
    for (const double share : even(exponential ? std::log(first) : 0,
                                   exponential ? std::log(last) : 1, levels.size())) {
        double level = 0;
        if (exponential) {
            level = std::exp(share);
        } else if (spacing == "karras") {
            const double high = std::pow(first, 1 / kRho), low = std::pow(last, 1 / kRho);
            level = std::pow(high + share * (low - high), kRho);
        } else {
            level = last + beta_quantile(1 - share) * (first - last);
        }
        found.push_back(static_cast<float>(level));
    }
    return found;
}

}  // namespace fluxdeploy
