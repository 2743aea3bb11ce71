// The runtimes that engines can be opened with, the choice among them, and the engines that are
// open.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backends/engine.hpp"
#include "files/bundle.hpp"

namespace fluxdeploy {

// Raise `Error` (usage) unless `name` is "auto" or a runtime that this library knows.
void check_runtime(const std::string& name);

// The engines of a bundle that pipelines have open, shared by all of them: of a component there is
// one, for as long as somebody holds it. Several threads may use it.
class EnginePool {
public:
    EnginePool(Bundle bundle, std::string runtime, EngineOptions options);

    const Bundle& bundle() const { return bundle_; }

    // The component's engine: the one that is open, else the best that can run on this machine,
    // opened now. Raises `Error` (engine) where there is none, and `Error` (bundle) where the
    // files are not those that the pool was made with, or the graph reads what the manifest does
    // not list.
    std::shared_ptr<Engine> open(const std::string& component);

private:
    // A runtime that was asked for, or why it is not there.
    struct Candidate {
        std::unique_ptr<Runtime> runtime;
        std::string problem;
    };

    // What opening a component goes by: other components are opened meanwhile.
    struct Slot {
        std::mutex mutex;
        std::weak_ptr<Engine> engine;
    };

    Candidate& candidate(const std::string& name);
    std::shared_ptr<Engine> open_best(const std::string& component);

    const Bundle bundle_;
    const std::string runtime_;
    const EngineOptions options_;
    std::mutex mutex_;
    std::map<std::string, Candidate> candidates_;
    std::map<std::string, std::unique_ptr<Slot>> slots_;
};

}  // namespace fluxdeploy
