// The tensors that a host gives to each component, and takes from it.
#pragma once

#include "files/manifest.hpp"

namespace fluxdeploy {

// The components that every picture takes.
inline constexpr const char* kNeededComponents[] = {"clip", "t5", "conditioner", "transformer",
                                                    "vae_decoder"};

// Raises `FieldError`, with the place in the manifest, for components whose tensors are others
// than a host expects, or in which a size is not the same on both sides.
void check_boundary(const Manifest& manifest);

}  // namespace fluxdeploy
