#include "backends/registry.hpp"

#include <algorithm>

#include "backends/graph_files.hpp"
#include "backends/onnxruntime.hpp"
#include "backends/openvino.hpp"
#include "backends/tensorrt.hpp"
#include "errors.hpp"

namespace fluxdeploy {
namespace {

// A runtime: its targets, best first; whether its engines are built, and not ONNX files.
struct Row {
    const char* name;
    std::vector<std::string> targets;
    bool builds;
    std::unique_ptr<Runtime> (*load)(const EngineOptions& options);
};

// Of engines that are built for a GPU: its compute capability.
[[maybe_unused]] const std::vector<std::string> kCapabilities{"sm121", "sm120", "sm100", "sm90",
                                                              "sm89",  "sm86",  "sm80",  "sm75"};

// Best first: a runtime joins by a line here.
const std::vector<Row>& rows() {
    static const std::vector<Row> all{
#ifdef FLUXDEPLOY_WITH_TENSORRT
        {"tensorrt", kCapabilities, true, load_tensorrt},
#endif
#ifdef FLUXDEPLOY_WITH_TENSORRT_RTX
        {"tensorrt-rtx", kCapabilities, true, load_tensorrt_rtx},
#endif
        {"onnxruntime", {"cuda", "cpu"}, false, load_onnxruntime},
#ifdef FLUXDEPLOY_WITH_OPENVINO
        {"openvino", {"cpu"}, false, load_openvino},
#endif
    };
    return all;
}

}  // namespace

void check_runtime(const std::string& name) {
    std::string known = "auto";
    for (const Row& row : rows()) known += std::string(", ") + row.name;
    const bool right = name == "auto" || std::any_of(rows().begin(), rows().end(),
                                                     [&](auto& row) { return row.name == name; });
    if (!right) {
        throw Error(ErrorCode::usage,
                    "There is no runtime '" + name + "'; the runtimes are " + known + ".");
    }
}

Runtimes::Runtimes(std::string name, EngineOptions options)
    : name_(std::move(name)), options_(std::move(options)) {
    check_runtime(name_);
}

Runtimes::Candidate& Runtimes::find(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = candidates_.find(name);
    if (known != candidates_.end()) return known->second;
    Candidate& made = candidates_[name];
    try {
        const auto row = std::find_if(rows().begin(), rows().end(),
                                      [&](const Row& each) { return each.name == name; });
        made.runtime = row->load(options_);
    } catch (const Error& error) {
        if (error.code() != ErrorCode::missing_dependency) {
            candidates_.erase(name);
            throw;
        }
        made.problem = error.what();
    }
    return made;
}

std::string Runtimes::problem(const EngineRecord& engine) {
    for (const Row& row : rows()) {
        if (row.name != engine.runtime) continue;
        if (std::find(row.targets.begin(), row.targets.end(), engine.target) == row.targets.end()) {
            break;
        }
        Candidate& loaded = find(row.name);
        return loaded.runtime ? loaded.runtime->problem(engine.target).value_or("")
                              : loaded.problem;
    }
    return "this library does not know it";
}

Manifest Runtimes::choose(const Manifest& manifest) {
    if (manifest.editions.empty()) return manifest;
    std::vector<Manifest> editions{manifest};
    editions.front().editions.clear();
    editions.insert(editions.end(), manifest.editions.begin(), manifest.editions.end());
    const auto runs = [&](const Manifest& edition) {
        return std::all_of(
            edition.components.begin(), edition.components.end(), [&](const auto& component) {
                const auto& engines = component.second.engines;
                return std::any_of(engines.begin(), engines.end(), [&](const EngineRecord& engine) {
                    return problem(engine).empty();
                });
            });
    };
    for (const Row& row : rows()) {
        if (name_ != "auto" && name_ != row.name) continue;
        for (const Manifest& edition : editions) {
            if (edition.runtime() != row.name) continue;
            if (name_ == row.name || runs(edition)) return edition;
        }
    }
    std::string reasons;
    for (const Manifest& edition : editions) {
        for (const EngineRecord& engine : edition.components.at("transformer").engines) {
            reasons += (reasons.empty() ? "" : "; ") + engine.runtime + " on " + engine.target;
            std::string why = name_ == "auto" ? problem(engine) : "";
            while (!why.empty() && why.back() == '.') why.pop_back();
            if (!why.empty()) reasons += ": " + why;
        }
    }
    throw Error(ErrorCode::engine,
                name_ == "auto"
                    ? "No edition of the bundle runs here. " + reasons + "."
                    : "The bundle has no edition for the runtime " + name_ +
                          "; it has editions for " + reasons + ".");
}

void Runtimes::load_for(const Manifest& manifest) noexcept {
    try {
        for (const Row& row : rows()) {
            if (name_ != "auto" && name_ != row.name) continue;
            for (const auto& [component, record] : manifest.components) {
                for (const EngineRecord& engine : record.engines) {
                    if (engine.runtime == row.name) return void(find(row.name));
                }
            }
        }
    } catch (const std::exception&) {
        return;
    }
}

EnginePool::EnginePool(Bundle bundle, std::unique_ptr<Runtimes> runtimes)
    : bundle_(std::move(bundle)), runtimes_(std::move(runtimes)) {
    for (const auto& [name, record] : bundle_.manifest.components) {
        slots_[name] = std::make_unique<Slot>();
    }
}

std::shared_ptr<Engine> EnginePool::open(const std::string& component) {
    const auto slot = slots_.find(component);
    if (slot == slots_.end()) {
        std::string names;
        for (const auto& [name, each] : slots_) names += (names.empty() ? "" : ", ") + name;
        throw Error(ErrorCode::engine, "The bundle " + bundle_.root.string() + " has no " +
                                           component + "; it holds " + names + ".");
    }
    const std::lock_guard<std::mutex> lock(slot->second->mutex);
    if (auto engine = slot->second->engine.lock()) return engine;
    auto engine = open_best(component);
    slot->second->engine = engine;
    return engine;
}

std::shared_ptr<Engine> EnginePool::open_best(const std::string& component) {
    const ComponentRecord& record = bundle_.manifest.components.at(component);
    std::string reasons;
    bool missing = false;
    for (const Row& row : rows()) {
        if (runtimes_->name() != "auto" && runtimes_->name() != row.name) continue;
        for (const std::string& target : row.targets) {
            const auto engine = std::find_if(
                record.engines.begin(), record.engines.end(), [&](const EngineRecord& each) {
                    return each.runtime == row.name && each.target == target;
                });
            if (engine == record.engines.end()) continue;
            Runtimes::Candidate& loaded = runtimes_->find(row.name);
            std::string problem = loaded.problem;
            missing = missing || !loaded.runtime;
            if (loaded.runtime) problem = loaded.runtime->problem(target).value_or("");
            if (problem.empty()) {
                require_unchanged(bundle_, record.files);
                if (!row.builds) check_graph(bundle_, record, engine->path);
                auto opened = loaded.runtime->open(component, record, *engine,
                                                   bundle_.path(engine->path).string());
                require_unchanged(bundle_, record.files);
                return opened;
            }
            while (!problem.empty() && problem.back() == '.') problem.pop_back();
            reasons += (reasons.empty() ? "" : "; ") + std::string(row.name) + " on " + target +
                       ": " + problem;
        }
    }
    if (reasons.empty()) {
        std::vector<std::string> built;
        for (const EngineRecord& each : record.engines) {
            built.push_back(each.runtime + " on " + each.target);
        }
        std::sort(built.begin(), built.end());
        built.erase(std::unique(built.begin(), built.end()), built.end());
        for (const std::string& each : built) reasons += (reasons.empty() ? "" : ", ") + each;
        reasons = "it has engines for " + (reasons.empty() ? "nothing" : reasons);
    }
    throw Error(missing ? ErrorCode::missing_dependency : ErrorCode::engine,
                "The bundle " + bundle_.root.string() + " has no " + component +
                    " engine that runs here with the runtime " + runtimes_->name() + ": " +
                    reasons + ".");
}

}  // namespace fluxdeploy
