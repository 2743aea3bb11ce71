// What an ONNX file reads beside itself, told from its bytes before a runtime sees them.
#pragma once

#include <string>

#include "files/bundle.hpp"

namespace fluxdeploy {

// Refuse a component's ONNX file that reads what the manifest does not list. Raises `Error`
// (bundle), naming the graph and the location.
void check_graph(const Bundle& bundle, const ComponentRecord& record, const std::string& path);

}  // namespace fluxdeploy
