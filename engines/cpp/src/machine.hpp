// What of this machine decides how a call is made.
#pragma once

#include <cstdint>
#include <optional>

namespace fluxdeploy {

// Bytes of memory that a process here can still have, as far as the limits of a container allow it;
// nothing where the system does not tell.
std::optional<std::int64_t> available_memory();

}  // namespace fluxdeploy
