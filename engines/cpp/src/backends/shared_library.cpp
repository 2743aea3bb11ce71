#include "backends/shared_library.hpp"

#include <dlfcn.h>

#include "errors.hpp"

namespace fluxdeploy {

SharedLibrary::SharedLibrary(const std::string& path, const std::string& what,
                             const std::string& advice)
    : what_(what), handle_(::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ != nullptr) return;
    const char* reason = ::dlerror();
    throw Error(ErrorCode::missing_dependency,
                what + " cannot be loaded: " + (reason ? reason : path) + ". " + advice);
}

void* SharedLibrary::symbol(const char* name) const {
    if (void* found = ::dlsym(handle_, name)) return found;
    throw Error(ErrorCode::missing_dependency,
                what_ + " has no function " + name + ". Install a version that fits.");
}

}  // namespace fluxdeploy
