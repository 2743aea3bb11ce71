#include "host/cancel.hpp"

#include <algorithm>
#include <chrono>

#include "errors.hpp"

namespace fluxdeploy {
namespace {

// How long a token may be cancelled before a waiting call hears of it.
constexpr std::chrono::milliseconds kLook{10};

}  // namespace

void CancelToken::check(const std::string& where) const {
    if (cancelled()) {
        throw Error(ErrorCode::cancelled, "Cancelled " + where + "; no picture was made.");
    }
}

Turns::Taken::Taken(Turns& turns, const CancelToken& cancel) : turns_(turns) {
    cancel.check("before it began");
    std::unique_lock<std::mutex> lock(turns_.mutex_);
    if (turns_.holder_ == std::this_thread::get_id()) {
        throw Error(ErrorCode::usage,
                    "A callback may not call its own pipeline, which waits for it. Call a clone.");
    }
    turns_.queue_.push_back(this);
    try {
        while (turns_.queue_.front() != this) {
            cancel.check("while it waited for its turn");
            turns_.changed_.wait_for(lock, kLook);
        }
    } catch (...) {
        auto& queue = turns_.queue_;
        queue.erase(std::find(queue.begin(), queue.end(), this));
        turns_.changed_.notify_all();
        throw;
    }
    turns_.holder_ = std::this_thread::get_id();
}

Turns::Taken::~Taken() {
    const std::lock_guard<std::mutex> lock(turns_.mutex_);
    turns_.queue_.pop_front();
    turns_.holder_ = {};
    turns_.changed_.notify_all();
}

}  // namespace fluxdeploy
