// OpenVINO through its C interface, on CPUs.
#pragma once

#include <memory>

#include "backends/engine.hpp"

namespace fluxdeploy {

// Raises `Error` (missing_dependency) where its library cannot be loaded.
std::unique_ptr<Runtime> load_openvino(const EngineOptions& options);

}  // namespace fluxdeploy
