// ONNX Runtime through its C interface: CPUs, and NVIDIA GPUs through its CUDA provider.
#pragma once

#include <memory>

#include "backends/engine.hpp"

namespace fluxdeploy {

// Raises `Error` (missing_dependency) where its library cannot be loaded or is too old.
std::unique_ptr<Runtime> load_onnxruntime(const EngineOptions& options);

}  // namespace fluxdeploy
