// A shared library that is loaded when it is needed.
#pragma once

#include <string>

namespace fluxdeploy {

// Runtimes are loaded and not linked: one build of this library serves machines that have some of
// them, and a program starts without those that it does not use. They are never unloaded: they keep
// threads and thread-local state, whose code must stay, and a second loading is free.
class SharedLibrary {
public:
    // Raises `Error` (missing_dependency): `what` names the library for people, `advice` says how
    // to get it.
    SharedLibrary(const std::string& path, const std::string& what, const std::string& advice);
    SharedLibrary(const SharedLibrary&) = delete;
    SharedLibrary& operator=(const SharedLibrary&) = delete;

    // A function by its name. Raises `Error` (missing_dependency) where there is none.
    template <class Function>
    Function function(const char* name) const {
        return reinterpret_cast<Function>(symbol(name));
    }

private:
    void* symbol(const char* name) const;

    std::string what_;
    void* handle_;
};

}  // namespace fluxdeploy
