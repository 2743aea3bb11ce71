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

// The runtimes that a bundle's engines may be opened with, each loaded when it is first asked for.
// Several threads may use them.
class Runtimes {
public:
    // A runtime that was asked for, or why it is not there.
    struct Candidate {
        std::unique_ptr<Runtime> runtime;
        std::string problem;
    };

    // `name` is "auto" or a runtime's.
    Runtimes(std::string name, EngineOptions options);

    const std::string& name() const { return name_; }

    // The runtime of that name. Raises `Error` (engine) where it is there and does not start.
    Candidate& find(const std::string& name);

    // The edition of a bundle that runs here, as a manifest that has no other: the one of the
    // runtime that was named, else of the best one. Raises `Error` (engine) where there is none; a
    // bundle with one edition is that one.
    Manifest choose(const Manifest& manifest);

    // Load what a bundle's engines will be tried with first, so that opening them need not. What
    // fails here is told where they are opened.
    void load_for(const Manifest& manifest) noexcept;

private:
    // Why engines of a runtime for a target cannot run here, or nothing where they can.
    std::string problem(const EngineRecord& engine);

    const std::string name_;
    const EngineOptions options_;
    std::mutex mutex_;
    std::map<std::string, Candidate> candidates_;
};

// The engines of a bundle that pipelines have open, shared by all of them: of a component there is
// one, for as long as somebody holds it. Several threads may use it.
class EnginePool {
public:
    EnginePool(Bundle bundle, std::unique_ptr<Runtimes> runtimes);

    const Bundle& bundle() const { return bundle_; }

    // The component's engine: the one that is open, else the best that can run on this machine,
    // opened now. Raises `Error` (engine) where there is none, and `Error` (bundle) where the
    // files are not those that the pool was made with, or the graph reads what the manifest does
    // not list.
    std::shared_ptr<Engine> open(const std::string& component);

private:
    // What opening a component goes by: other components are opened meanwhile.
    struct Slot {
        std::mutex mutex;
        std::weak_ptr<Engine> engine;
    };

    std::shared_ptr<Engine> open_best(const std::string& component);

    const Bundle bundle_;
    // Before the slots: runtimes outlive their engines.
    const std::unique_ptr<Runtimes> runtimes_;
    std::map<std::string, std::unique_ptr<Slot>> slots_;
};

}  // namespace fluxdeploy
