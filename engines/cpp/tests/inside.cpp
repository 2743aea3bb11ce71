// What tests ask of the library's inside: one question a run, numbers to stdout as raw bytes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "files/manifest.hpp"
#include "host/input_images.hpp"
#include "host/tiles.hpp"
#include "machine.hpp"
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

// Half of a VAE that looks at no neighbour, and takes away the mean of all that it is given: as
// norms do, so that a tile alone is off.
class Vae {
public:
    explicit Vae(std::int64_t factor) : factor_(factor) {}

    fluxdeploy::Outputs operator()(const std::string& component,
                                   const fluxdeploy::Inputs& inputs) const {
        if (component == "vae_decoder") return {{"images", made(inputs.at("latents"), true)}};
        fluxdeploy::Floats mean = made(inputs.at("images"), false), logvar = mean;
        for (float& value : logvar.values) value = -value;
        return {{"mean", std::move(mean)}, {"logvar", std::move(logvar)}};
    }

private:
    // Pixels for each latent, or the first pixel of each.
    fluxdeploy::Floats made(const fluxdeploy::View& given, bool larger) const {
        const fluxdeploy::Shape& shape = given.shape();
        const std::int64_t height = shape[2], width = shape[3], plane = height * width;
        const auto size = [&](std::int64_t side) {
            return larger ? side * factor_ : side / factor_;
        };
        const auto from = [&](std::int64_t side) {
            return larger ? side / factor_ : side * factor_;
        };
        fluxdeploy::Floats found({1, 3, size(height), size(width)});
        float* to = found.data();
        for (std::int64_t channel = 0; channel < 3; ++channel) {
            const float* values = given.floats() + channel * plane;
            const double sum = std::accumulate(values, values + plane, 0.0);
            const auto mean = static_cast<float>(sum / static_cast<double>(plane));
            for (std::int64_t at = 0; at < size(height) * size(width); ++at) {
                const std::int64_t row = at / size(width), column = at % size(width);
                *to++ = values[from(row) * width + from(column)] - mean;
            }
        }
        return found;
    }

    std::int64_t factor_;
};

fluxdeploy::Floats floats(const std::string& bytes, fluxdeploy::Shape shape) {
    fluxdeploy::Floats array(std::move(shape));
    std::memcpy(array.data(), bytes.data(), bytes.size());
    return array;
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
    } else if (what == "tiles") {  // COMPONENT SIDE FACTOR CHANNELS ROWS COLUMNS, floats on stdin
        const fluxdeploy::Run run = Vae(numbers[2]);
        const auto given = floats(standard_input(), {1, numbers[3], numbers[4], numbers[5]});
        for (const auto& output :
             fluxdeploy::run_in_tiles(run, words[2], given, numbers[1], numbers[2])) {
            write(output.second.values);
        }
    } else if (what == "memory") {
        std::printf("%lld", static_cast<long long>(fluxdeploy::available_memory().value_or(-1)));
    } else {
        return 2;
    }
    return 0;
}
