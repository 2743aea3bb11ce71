// The tensors that a host gives to each component, and takes from it.
#pragma once

#include "files/manifest.hpp"

namespace fluxdeploy {

// The components that every picture takes.
inline constexpr const char* kNeededComponents[] = {"clip", "t5", "conditioner", "transformer",
                                                    "vae_decoder"};

// What ControlNets give and the transformer takes, of blocks that a network has.
inline constexpr const char* kResiduals[] = {"double_residuals", "single_residuals"};

// What an IP-Adapter makes of a picture and the transformer attends to, of all double blocks.
inline constexpr const char* kSeen[] = {"ip_keys", "ip_values"};

// Whether a tensor of that name holds residuals.
bool is_residuals(const std::string& name);

// Raises `FieldError`, with the place in the manifest, for components whose tensors are others
// than a host expects, or in which a size is not the same on both sides.
void check_boundary(const Manifest& manifest);

}  // namespace fluxdeploy
