// Work that several threads share.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

namespace fluxdeploy {

// Do `work` for each number of `order`, which are those from 0 on, on so many threads at most, the
// caller's among them. They are begun in that order. What it raises is raised once all have ended,
// of several the one of the smallest number.
void side_by_side(const std::vector<std::size_t>& order, std::size_t threads,
                  const std::function<void(std::size_t)>& work);

}  // namespace fluxdeploy
