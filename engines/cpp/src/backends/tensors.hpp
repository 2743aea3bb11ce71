// Checking tensors against an engine's boundary, in words a caller can act on.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "backends/engine.hpp"

namespace fluxdeploy {

// By symbol, its size.
using Sizes = std::map<std::string, std::int64_t>;

// What a graph has of a tensor: its dtype, and its sizes, -1 where one is free.
struct Found {
    std::string name;
    std::string dtype;
    Shape shape;
};

// Hold what a manifest says of an engine's tensors against the graph that was opened. Raises
// `Error` (engine) for a graph that takes other tensors, or does not give those.
void check_boundary(const Engine& engine, const std::vector<Found>& inputs,
                    const std::vector<Found>& outputs);

// The shape of an output, or none where a symbol of it is none of the inputs'.
std::optional<Shape> output_shape(const TensorSpec& spec, const Sizes& sizes);

// A binding's inputs: `resident` are in place, `changing` come with every call.
class BoundInputs {
public:
    // Raises `Error` (engine) where the tensors to put in place do not fit the engine.
    BoundInputs(const Engine& engine, const Inputs& resident);

    // Hold a call's tensors against what changes; the size of every symbol. Raises `Error`
    // (engine) for a missing or unknown tensor, a wrong type or shape, and a size outside the
    // engine's range.
    Sizes check(const Inputs& inputs) const;

private:
    const Engine& engine_;
    std::vector<const TensorSpec*> changing_;
    Sizes sizes_;
};

}  // namespace fluxdeploy
