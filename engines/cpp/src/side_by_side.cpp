#include "side_by_side.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <future>

namespace fluxdeploy {

void side_by_side(const std::vector<std::size_t>& order, std::size_t threads,
                  const std::function<void(std::size_t)>& work) {
    std::vector<std::exception_ptr> failed(order.size());
    std::atomic<std::size_t> next{0};
    const auto share = [&] {
        for (std::size_t i = next++; i < order.size(); i = next++) {
            try {
                work(order[i]);
            } catch (...) {
                failed[order[i]] = std::current_exception();
            }
        }
    };
    std::vector<std::future<void>> others;
    for (std::size_t i = 1; i < std::min(threads, order.size()); ++i) {
        others.push_back(std::async(std::launch::async, share));
    }
    share();
    for (auto& other : others) other.get();
    for (const auto& each : failed) {
        if (each) std::rethrow_exception(each);
    }
}

}  // namespace fluxdeploy
