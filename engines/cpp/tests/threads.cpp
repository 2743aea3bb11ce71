// Threads that share one bundle, for ThreadSanitizer: threads BUNDLE
//
// Each of two pipelines serves two threads, so that engines are shared, calls wait for their turn,
// and cancelled ones wait, run or are over. Each picture that is made is that of its seed.
#include <fluxdeploy/fluxdeploy.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

constexpr int kCalls = 6;
constexpr int kSeeds = 2;

fluxdeploy::Request request_of(int seed) {
    fluxdeploy::Request request;
    request.prompts = {"a red circle above a blue square"};
    request.seed = static_cast<std::uint64_t>(seed);
    request.height = 32;
    request.width = 32;
    request.num_inference_steps = 3;
    return request;
}

struct Tally {
    std::atomic<int> made{0};
    std::atomic<int> cancelled{0};
    std::atomic<int> wrong{0};
};

void make(fluxdeploy::Pipeline& pipeline, const std::vector<fluxdeploy::Image>& wanted,
          Tally& tally) {
    for (int call = 0; call < kCalls; ++call) {
        const int seed = call % kSeeds;
        fluxdeploy::Request request = request_of(seed);
        const fluxdeploy::CancelToken token;
        request.cancel = token;
        std::thread canceller([&, call] {
            if (call % 3 == 0) return;
            std::this_thread::sleep_for(std::chrono::milliseconds(7 * call));
            token.cancel();
        });
        try {
            const auto made = pipeline.generate(request).images.front().pixels;
            if (made != wanted[static_cast<std::size_t>(seed)].pixels) ++tally.wrong;
            ++tally.made;
        } catch (const fluxdeploy::Error& error) {
            ++(error.code() == FLUXDEPLOY_CANCELLED ? tally.cancelled : tally.wrong);
        }
        canceller.join();
    }
}

}  // namespace

int main(int count, char** words) {
    if (count != 2) return 2;
    fluxdeploy::Pipeline first(words[1]);
    fluxdeploy::Pipeline second = first.clone();
    std::vector<fluxdeploy::Image> wanted;
    for (int seed = 0; seed < kSeeds; ++seed) {
        wanted.push_back(first.generate(request_of(seed)).images.front());
    }
    Tally tally;
    std::vector<std::thread> threads;
    for (fluxdeploy::Pipeline* pipeline : {&first, &second, &first, &second}) {
        threads.emplace_back(make, std::ref(*pipeline), std::cref(wanted), std::ref(tally));
    }
    for (std::thread& thread : threads) thread.join();
    std::printf("%d made, %d cancelled, %d wrong\n", tally.made.load(), tally.cancelled.load(),
                tally.wrong.load());
    return tally.wrong == 0 && tally.made > 0 && tally.cancelled > 0 ? 0 : 1;
}
