#include "errors.hpp"

#include "files/words.hpp"

namespace fluxdeploy {
namespace {

constexpr std::size_t kMaxMessage = 2000;

}  // namespace

Error::Error(ErrorCode code, const std::string& message)
    : std::runtime_error(without_middle(message, kMaxMessage)), code_(code) {}

}  // namespace fluxdeploy
