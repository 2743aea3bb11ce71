// A server's loop: two workers with a pipeline each, which share the weights; jobs come line by
// line on standard input, `NUMBER PROMPT`, and `cancel NUMBER` ends one, whether it runs or waits.
//
//     server BUNDLE FOLDER
#include <fluxdeploy/fluxdeploy.h>

#include <condition_variable>
#include <deque>
#include <iostream>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>

namespace {

struct Job {
    std::string number;
    std::string prompt;
    fluxdeploy::CancelToken cancel;
};

class Queue {
public:
    void add(Job job) {
        const std::lock_guard<std::mutex> lock(mutex_);
        tokens_.insert_or_assign(job.number, job.cancel);
        waiting_.push_back(std::move(job));
        changed_.notify_one();
    }

    void cancel(const std::string& number) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto token = tokens_.find(number);
        if (token != tokens_.end()) token->second.cancel();
    }

    void close() {
        const std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
        changed_.notify_all();
    }

    // The next job; none where there will be no more.
    std::optional<Job> take() {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return closed_ || !waiting_.empty(); });
        if (waiting_.empty()) return std::nullopt;
        Job job = std::move(waiting_.front());
        waiting_.pop_front();
        return job;
    }

    // One line at a time.
    void say(const std::string& line) {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::cout << line << std::endl;
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Job> waiting_;
    std::map<std::string, fluxdeploy::CancelToken> tokens_;
    bool closed_ = false;
};

void work(fluxdeploy::Pipeline pipeline, Queue& queue, const std::string& folder) {
    while (const auto job = queue.take()) {
        try {
            fluxdeploy::Request request;
            request.prompts = {job->prompt};
            request.seed = 7;
            request.cancel = job->cancel;
            const fluxdeploy::Result result = pipeline.generate(request);
            const std::string path = folder + "/" + job->number + ".png";
            fluxdeploy::write_png(path, result.images.front());
            queue.say(job->number + " done " + path);
        } catch (const fluxdeploy::Error& error) {
            const bool cancelled = error.code() == FLUXDEPLOY_CANCELLED;
            queue.say(job->number + (cancelled ? " cancelled" : " failed: ") +
                      (cancelled ? "" : error.what()));
        }
    }
}

}  // namespace

int main(int count, char** words) {
    if (count != 3) return 2;
    try {
        fluxdeploy::Pipeline pipeline(words[1]);
        pipeline.load();
        Queue queue;
        std::thread first(work, pipeline.clone(), std::ref(queue), words[2]);
        std::thread second(work, pipeline.clone(), std::ref(queue), words[2]);
        for (std::string line; std::getline(std::cin, line);) {
            std::istringstream read(line);
            std::string number, prompt;
            read >> number;
            std::getline(read >> std::ws, prompt);
            if (number == "cancel") {
                queue.cancel(prompt);
            } else {
                queue.add({number, prompt, {}});
            }
        }
        queue.close();
        first.join();
        second.join();
    } catch (const fluxdeploy::Error& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}
