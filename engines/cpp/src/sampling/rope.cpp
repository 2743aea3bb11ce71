#include "sampling/rope.hpp"

#include <cmath>

#include "errors.hpp"

namespace fluxdeploy {

RopeTables rope_tables(const RopeSpec& spec, std::int64_t text_tokens, std::int64_t rows,
                       std::int64_t columns) {
    const std::size_t axes = spec.axes_dims.size();
    if (axes < 2) {
        throw Error(ErrorCode::bundle, "The manifest gives RoPE " + std::to_string(axes) +
                                           " axes. Rows and columns take two; rebuild the bundle.");
    }
    std::int64_t channels = 0;
    for (const std::int64_t dim : spec.axes_dims) channels += dim;
    const Shape shape{text_tokens + rows * columns, channels};
    RopeTables tables{Floats(shape), Floats(shape)};
    std::int64_t start = 0;
    for (std::size_t axis = 0; axis < axes; ++axis) {
        const std::int64_t dim = spec.axes_dims[axis];
        for (std::int64_t pair = 0; pair < dim / 2; ++pair) {
            const double share = static_cast<double>(2 * pair) / static_cast<double>(dim);
            const double frequency = 1.0 / std::pow(spec.theta, share);
            for (std::int64_t token = 0; token < shape[0]; ++token) {
                const std::int64_t place = token - text_tokens;
                std::int64_t id = 0;
                if (place >= 0 && axis == axes - 2) id = place / columns;
                if (place >= 0 && axis == axes - 1) id = place % columns;
                const double angle = static_cast<double>(id) * frequency;
                const auto at = static_cast<std::size_t>(token * channels + start + 2 * pair);
                tables.cos.values[at] = tables.cos.values[at + 1] =
                    static_cast<float>(std::cos(angle));
                tables.sin.values[at] = tables.sin.values[at + 1] =
                    static_cast<float>(std::sin(angle));
            }
        }
        start += dim;
    }
    return tables;
}

}  // namespace fluxdeploy
