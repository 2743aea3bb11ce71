// TensorRT and TensorRT-RTX: engines that were built for a GPU's compute capability.
//
// The two have one interface and headers of their own: tensorrt.cpp is compiled once with each.
#pragma once

#include <memory>

#include "backends/engine.hpp"

namespace fluxdeploy {

// Raise `Error` (missing_dependency) where the library, or NVIDIA's driver, cannot be loaded.
std::unique_ptr<Runtime> load_tensorrt(const EngineOptions& options);
std::unique_ptr<Runtime> load_tensorrt_rtx(const EngineOptions& options);

}  // namespace fluxdeploy
