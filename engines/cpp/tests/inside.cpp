// What tests ask of the library's inside: one question a run, numbers to stdout as raw bytes.
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "files/manifest.hpp"
#include "host/input_images.hpp"
#include "sampling/noise.hpp"
#include "sampling/rope.hpp"
#include "sampling/schedule.hpp"

namespace {

template <class T>
void write(const std::vector<T>& values) {
    std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

std::string standard_input() {
    std::string text;
    for (int c = std::getchar(); c != EOF; c = std::getchar()) text.push_back(static_cast<char>(c));
    return text;
}

}  // namespace

int main(int count, char** words) {
    const std::string what = count > 1 ? words[1] : "";
    std::vector<long long> numbers;
    for (int i = 2; i < count; ++i) numbers.push_back(std::strtoll(words[i], nullptr, 10));
    if (what == "noise") {  // SEED COUNT...: tensors of one generator
        fluxdeploy::TorchGenerator generator(std::strtoull(words[2], nullptr, 10));
        for (std::size_t i = 1; i < numbers.size(); ++i) {
            std::vector<float> values(static_cast<std::size_t>(numbers[i]));
            generator.normal(values.data(), numbers[i]);
            write(values);
        }
    } else if (what == "sigmas") {  // STEPS TOKENS, a manifest on stdin
        const auto manifest = fluxdeploy::parse_manifest(standard_input(), "stdin");
        write(
            fluxdeploy::sigmas(manifest.schedule, fluxdeploy::even_levels(numbers[0]), numbers[1]));
    } else if (what == "rope") {  // TEXT ROWS COLUMNS, a manifest on stdin
        const auto manifest = fluxdeploy::parse_manifest(standard_input(), "stdin");
        const auto tables =
            fluxdeploy::rope_tables(manifest.rope, numbers[0], {{numbers[1], numbers[2]}});
        write(tables.cos.values);
        write(tables.sin.values);
    } else if (what == "resize") {  // HEIGHT WIDTH NEW_HEIGHT NEW_WIDTH, RGB on stdin
        const std::string bytes = standard_input();
        write(fluxdeploy::resize_lanczos({bytes.begin(), bytes.end()}, numbers[0], numbers[1], 3,
                                         numbers[2], numbers[3]));
    } else {
        return 2;
    }
    return 0;
}
