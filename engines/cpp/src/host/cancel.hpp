// Stopping a call: a token that any thread may cancel, and turns that it can end the wait for.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace fluxdeploy {

// Ends the calls that were given it. Copies are the same token; it stays cancelled.
class CancelToken {
public:
    CancelToken() : cancelled_(std::make_shared<std::atomic<bool>>(false)) {}

    void cancel() const { *cancelled_ = true; }
    bool cancelled() const { return *cancelled_; }

    // Raise `Error` (cancelled) where `cancel` was called; `where` says how far the call has come.
    void check(const std::string& where) const;

private:
    std::shared_ptr<std::atomic<bool>> cancelled_;
};

// A lock that is given in the order of asking.
class Turns {
public:
    // Holds the lock for as long as it lives. Raises `Error` (cancelled) where the token is, within
    // some milliseconds, and `Error` (usage) in a thread that holds the lock already.
    class Taken {
    public:
        Taken(Turns& turns, const CancelToken& cancel);
        ~Taken();
        Taken(const Taken&) = delete;
        Taken& operator=(const Taken&) = delete;

    private:
        Turns& turns_;
    };

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<const Taken*> queue_;  // its first has the turn
    std::thread::id holder_;
};

}  // namespace fluxdeploy
