// Arrays that a host computes with.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fluxdeploy {

using Shape = std::vector<std::int64_t>;

// How many numbers an array of that shape has.
inline std::int64_t count(const Shape& shape) {
    std::int64_t product = 1;
    for (const std::int64_t size : shape) product *= size;
    return product;
}

// Numbers in row-major order.
template <class T>
struct Array {
    Shape shape;
    std::vector<T> values;

    Array() = default;
    explicit Array(Shape sizes)
        : shape(std::move(sizes)), values(static_cast<std::size_t>(count(shape))) {}
    Array(Shape sizes, std::vector<T> numbers)
        : shape(std::move(sizes)), values(std::move(numbers)) {}

    const T* data() const { return values.data(); }
    T* data() { return values.data(); }
    std::int64_t size() const { return static_cast<std::int64_t>(values.size()); }
};

using Floats = Array<float>;
using Ints = Array<std::int32_t>;

// Whether all of `count` numbers are neither NaN nor infinite.
bool all_finite(const float* values, std::int64_t count);

}  // namespace fluxdeploy
