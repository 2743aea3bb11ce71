#include "sampling/rope.hpp"

#include <cmath>

#include "errors.hpp"

namespace fluxdeploy {

namespace {

// A token's number on the first axis, on the last but one, and on the last.
struct Id {
    std::int64_t picture = 0;
    std::int64_t row = 0;
    std::int64_t column = 0;
};

std::vector<Id> joint_ids(std::int64_t text_tokens, const std::vector<TokenGrid>& pictures) {
    std::vector<Id> ids(static_cast<std::size_t>(text_tokens));
    for (std::size_t picture = 0; picture < pictures.size(); ++picture) {
        const TokenGrid& grid = pictures[picture];
        for (std::int64_t at = 0; at < grid.rows * grid.columns; ++at) {
            ids.push_back(
                {static_cast<std::int64_t>(picture), at / grid.columns, at % grid.columns});
        }
    }
    return ids;
}

}  // namespace

RopeTables rope_tables(const RopeSpec& spec, std::int64_t text_tokens,
                       const std::vector<TokenGrid>& pictures) {
    const std::size_t axes = spec.axes_dims.size();
    if (axes < 2) {
        throw Error(ErrorCode::bundle, "The manifest gives RoPE " + std::to_string(axes) +
                                           " axes. Rows and columns take two; rebuild the bundle.");
    }
    std::int64_t channels = 0;
    for (const std::int64_t dim : spec.axes_dims) channels += dim;
    const std::vector<Id> ids = joint_ids(text_tokens, pictures);
    const Shape shape{static_cast<std::int64_t>(ids.size()), channels};
    RopeTables tables{Floats(shape), Floats(shape)};
    std::int64_t start = 0;
    for (std::size_t axis = 0; axis < axes; ++axis) {
        const std::int64_t dim = spec.axes_dims[axis];
        for (std::int64_t pair = 0; pair < dim / 2; ++pair) {
            const double share = static_cast<double>(2 * pair) / static_cast<double>(dim);
            const double frequency = 1.0 / std::pow(spec.theta, share);
            for (std::int64_t token = 0; token < shape[0]; ++token) {
                const Id& each = ids[static_cast<std::size_t>(token)];
                std::int64_t id = axis == 0 ? each.picture : 0;
                if (axis == axes - 2) id = each.row;
                if (axis == axes - 1) id = each.column;
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
