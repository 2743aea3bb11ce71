#include "host/tiles.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <tuple>

#include "arguments.hpp"
#include "errors.hpp"

namespace fluxdeploy {
namespace {

// Latents of a tile's side. One size, whatever memory is free: a seed gives one of two pictures.
constexpr std::int64_t kSide = 96;
// Latents on each side of an overlap that are cut away, and those between that are mixed.
constexpr std::int64_t kCut = 8, kRamp = 16;
// Of the free memory, what a run may take: its figure is an estimate.
constexpr double kShare = 0.8;

bool decodes(const std::string& component) { return component == "vae_decoder"; }

const char* input_of(const std::string& component) {
    return decodes(component) ? "latents" : "images";
}

// From `first` to `end`, of rows or columns.
struct Range {
    std::int64_t first = 0;
    std::int64_t end = 0;
    std::int64_t size() const { return end - first; }
    Range times(std::int64_t unit) const { return {first * unit, end * unit}; }
};

// Rows and columns of an array [1, C, H, W].
Floats cut(const Floats& array, Range rows, Range columns) {
    const std::int64_t height = array.shape[2], width = array.shape[3];
    Floats part({1, array.shape[1], rows.size(), columns.size()});
    float* to = part.data();
    for (std::int64_t channel = 0; channel < array.shape[1]; ++channel) {
        for (std::int64_t row = rows.first; row < rows.end; ++row) {
            const float* from = array.data() + (channel * height + row) * width;
            to = std::copy(from + columns.first, from + columns.end, to);
        }
    }
    return part;
}

// The means of blocks of size x size; the last blocks go on with what is at the edge, up to
// `height` x `width` of them.
Floats means(const Floats& array, std::int64_t size, std::int64_t height, std::int64_t width) {
    const std::int64_t tall = array.shape[2], wide = array.shape[3];
    Floats made({1, array.shape[1], height, width});
    float* to = made.data();
    for (std::int64_t channel = 0; channel < array.shape[1]; ++channel) {
        const float* plane = array.data() + channel * tall * wide;
        for (std::int64_t at = 0; at < height * width; ++at) {
            double sum = 0;
            for (std::int64_t inner = 0; inner < size * size; ++inner) {
                const std::int64_t row = at / width * size + inner / size;
                const std::int64_t column = at % width * size + inner % size;
                sum += plane[std::min(row, tall - 1) * wide + std::min(column, wide - 1)];
            }
            *to++ = static_cast<float>(sum / static_cast<double>(size * size));
        }
    }
    return made;
}

// Where a tile lies along an axis, and the weight of each of what it makes.
struct Span {
    Range range;
    std::vector<float> weights;
};

// From 0 to 1 around a middle, without a corner at either end.
double rise(double distance) {
    const double x = std::clamp(distance / static_cast<double>(kRamp) + 0.5, 0.0, 1.0);
    return x * x * (3 - 2 * x);
}

// Tiles of one size along an axis; the weights of all add up to 1 everywhere.
std::vector<Span> spans(std::int64_t length, std::int64_t side, std::int64_t made) {
    if (side >= length) {
        return {{{0, length}, std::vector<float>(static_cast<std::size_t>(length * made), 1.0f)}};
    }
    const std::int64_t around = 2 * kCut + kRamp;
    const std::int64_t count = (length - around + side - around - 1) / (side - around);
    const auto start = [&](std::int64_t index) {
        // A half goes to the even one, as Python's `round` has it.
        return static_cast<std::int64_t>(std::nearbyint(
            static_cast<double>(index * (length - side)) / static_cast<double>(count - 1)));
    };
    // The middle of an overlap, where one tile's share becomes the next one's.
    const auto middle = [&](std::int64_t index) {
        return static_cast<double>(start(index) + side + start(index + 1)) / 2;
    };
    std::vector<Span> found;
    for (std::int64_t index = 0; index < count; ++index) {
        Span span{{start(index), start(index) + side}, {}};
        for (std::int64_t at = 0; at < side * made; ++at) {
            const double place = static_cast<double>(start(index)) +
                                 (static_cast<double>(at) + 0.5) / static_cast<double>(made);
            double weight = 1;
            if (index > 0) weight *= rise(place - middle(index - 1));
            if (index < count - 1) weight *= 1 - rise(place - middle(index));
            span.weights.push_back(static_cast<float>(weight));
        }
        found.push_back(std::move(span));
    }
    return found;
}

// How many times smaller a side must be, for all of a picture to be no larger than a tile.
std::int64_t shrink_of(std::int64_t height, std::int64_t width, std::int64_t side) {
    std::int64_t shrink = 2;
    const auto small = [&](std::int64_t size) { return (size + shrink - 1) / shrink; };
    while (small(height) * small(width) > side * side) ++shrink;
    return shrink;
}

// A half of the VAE: its input takes `given` numbers along a latent's side, and an output `made`.
class Half {
public:
    Half(const Run& run, const std::string& component, std::int64_t factor)
        : given(decodes(component) ? 1 : factor),
          made(decodes(component) ? factor : 1),
          run_(run),
          component_(component) {}

    // Run it on a part. Raises `Error` (engine) for outputs that have not the part's size.
    Outputs run(const Floats& part) {
        Outputs outputs = run_(component_, {{input_of(component_), part}});
        for (const auto& [name, values] : outputs) {
            const std::int64_t first = values.shape.size() == 4 ? values.shape[1] : 1;
            const std::int64_t channels = channels_.emplace(name, first).first->second;
            const Shape wanted{1, channels, part.shape[2] / given * made,
                               part.shape[3] / given * made};
            if (values.shape == wanted) continue;
            throw Error(ErrorCode::engine, "The " + component_ + " gave " + name + " " +
                                               shown(values.shape) + " where it must be " +
                                               shown(wanted) +
                                               ". Build the bundle again with `fluxdeploy build`.");
        }
        return outputs;
    }

    const std::int64_t given, made;

private:
    const Run& run_;
    const std::string& component_;
    std::map<std::string, std::int64_t> channels_;
};

// The whole picture, made small enough to be run at once, and what tiles lack beside it. A tile is
// also run as small, without the rest: what the rest would change there is nearly what it would
// change in the tile, since it is the statistics of norms, and so smooth.
class Small {
public:
    Small(Half& half, const Floats& array, std::int64_t shrink) : half_(half), shrink_(shrink) {
        const auto small = [&](std::int64_t size) {
            return (size + shrink * half.given - 1) / (shrink * half.given) * half.given;
        };
        input_ = means(array, shrink, small(array.shape[2]), small(array.shape[3]));
        outputs_ = half.run(input_);
    }

    // What to add to the outputs of a tile.
    Outputs missing(Range rows, Range columns) const {
        const Lines down = lines(rows), across = lines(columns);
        const std::int64_t given = half_.given, made = half_.made;
        const Floats part = cut(input_, down.range.times(given), across.range.times(given));
        Outputs found;
        for (const auto& [name, alone] : half_.run(part)) {
            Floats change =
                cut(outputs_.at(name), down.range.times(made), across.range.times(made));
            for (std::size_t i = 0; i < change.values.size(); ++i) {
                change.values[i] -= alone.values[i];
            }
            found[name] =
                spread(means(change, made, down.range.size(), across.range.size()), down, across);
        }
        return found;
    }

private:
    // The small latents of a tile's, and for each of what it makes the nearest of them, by its
    // place in the range, and how far it is on the way to the next one.
    struct Lines {
        Range range;
        std::vector<std::pair<std::int64_t, float>> places;
    };

    Lines lines(Range range) const {
        Lines found{{range.first / shrink_, (range.end + shrink_ - 1) / shrink_}, {}};
        const auto last = static_cast<double>(found.range.size() - 1);
        const std::int64_t made = half_.made;
        for (std::int64_t at = range.first * made; at < range.end * made; ++at) {
            const double pixel = (static_cast<double>(at) + 0.5) / static_cast<double>(made);
            const double place = std::clamp(
                pixel / static_cast<double>(shrink_) - 0.5 - static_cast<double>(found.range.first),
                0.0, last);
            const auto near = std::min(static_cast<std::int64_t>(place),
                                       std::max<std::int64_t>(found.range.size() - 2, 0));
            found.places.emplace_back(near, static_cast<float>(place - static_cast<double>(near)));
        }
        return found;
    }

    // From one number for each small latent along straight lines to those between.
    static Floats spread(const Floats& values, const Lines& down, const Lines& across) {
        const std::int64_t channels = values.shape[1];
        const std::int64_t tall = values.shape[2], wide = values.shape[3];
        Floats made({1, channels, static_cast<std::int64_t>(down.places.size()),
                     static_cast<std::int64_t>(across.places.size())});
        float* to = made.data();
        for (std::int64_t channel = 0; channel < channels; ++channel) {
            for (const auto& [row, lower] : down.places) {
                const float* above = values.data() + (channel * tall + row) * wide;
                const float* below = row + 1 < tall ? above + wide : above;
                for (const auto& [column, right] : across.places) {
                    const std::int64_t next = std::min(column + 1, wide - 1);
                    const float left = (1 - lower) * above[column] + lower * below[column];
                    const float other = (1 - lower) * above[next] + lower * below[next];
                    *to++ = (1 - right) * left + right * other;
                }
            }
        }
        return made;
    }

    Half& half_;
    const std::int64_t shrink_;
    Floats input_;
    Outputs outputs_;
};

// Add what a tile makes, with what it lacks, by its weights.
void lay(const Floats& tile, const Floats& missing, const Span& down, const Span& across,
         std::int64_t made, Floats& whole) {
    const std::int64_t height = whole.shape[2], width = whole.shape[3];
    const float *own = tile.data(), *more = missing.data();
    for (std::int64_t channel = 0; channel < whole.shape[1]; ++channel) {
        for (std::size_t row = 0; row < down.weights.size(); ++row) {
            const std::int64_t line = down.range.first * made + static_cast<std::int64_t>(row);
            float* to =
                whole.data() + (channel * height + line) * width + across.range.first * made;
            for (const float weight : across.weights) {
                *to++ += down.weights[row] * weight * (*own++ + *more++);
            }
        }
    }
}

std::string sentence(const std::string& component, std::int64_t height, std::int64_t width,
                     double cost, std::int64_t factor) {
    const std::int64_t side = kSide * factor;
    char gigabytes[32];
    std::snprintf(gigabytes, sizeof gigabytes, "%.1f",
                  static_cast<double>(height * width) * cost / kShare / 1e9);
    return "The " + std::to_string(width) + "x" + std::to_string(height) + " picture was " +
           (decodes(component) ? "decoded" : "encoded") + " in tiles of " +
           std::to_string(std::min(side, width)) + "x" + std::to_string(std::min(side, height)) +
           " pixels, since the whole takes " + gigabytes +
           " GB of free memory: colors can differ from those of the whole. Free memory, set "
           "low_vram, or ask for a smaller size.";
}

// Decides for each half of the VAE and size, once.
class Decisions {
public:
    Decisions(const Manifest& manifest, std::function<void(const std::string&)> tell,
              std::function<std::optional<std::int64_t>()> free_memory)
        : manifest_(manifest), tell_(std::move(tell)), free_memory_(std::move(free_memory)) {}

    // Whether a picture of so many latents is run in tiles.
    bool in_tiles(const std::string& component, std::int64_t height, std::int64_t width) {
        const auto key = std::tuple(component, height, width);
        const auto known = decided_.find(key);
        if (known != decided_.end()) return known->second;
        return decided_[key] = decide(component, height, width);
    }

private:
    // Never where they are no more than a tile's, or where it is not known what is free or taken.
    bool decide(const std::string& component, std::int64_t height, std::int64_t width) {
        const auto recorded = manifest_.vae_bytes_per_pixel.find(component);
        if (recorded == manifest_.vae_bytes_per_pixel.end()) return false;
        const auto free = free_memory_();
        if (!free || height * width <= kSide * kSide) return false;
        const std::int64_t factor = manifest_.latents.spatial_factor;
        const auto cost = static_cast<double>(recorded->second);
        const double needed = static_cast<double>(height * width * factor * factor) * cost;
        if (needed <= kShare * static_cast<double>(*free)) return false;
        tell_(sentence(component, height * factor, width * factor, cost, factor));
        return true;
    }

    const Manifest& manifest_;
    std::function<void(const std::string&)> tell_;
    std::function<std::optional<std::int64_t>()> free_memory_;
    std::map<std::tuple<std::string, std::int64_t, std::int64_t>, bool> decided_;
};

}  // namespace

Run tiled(Run run, const Manifest& manifest, std::function<void(const std::string&)> tell,
          std::function<std::optional<std::int64_t>()> free_memory) {
    const auto decisions =
        std::make_shared<Decisions>(manifest, std::move(tell), std::move(free_memory));
    const std::int64_t factor = manifest.latents.spatial_factor;
    return [run = std::move(run), decisions, factor](const std::string& component,
                                                     const Inputs& inputs) {
        if (component != "vae_decoder" && component != "vae_encoder") return run(component, inputs);
        const View& view = inputs.at(input_of(component));
        const std::int64_t unit = decodes(component) ? 1 : factor;
        const Shape& shape = view.shape();
        if (!decisions->in_tiles(component, shape[2] / unit, shape[3] / unit)) {
            return run(component, inputs);
        }
        const Floats array(shape, {view.floats(), view.floats() + count(shape)});
        return run_in_tiles(run, component, array, kSide, factor);
    };
}

Outputs run_in_tiles(const Run& run, const std::string& component, const Floats& array,
                     std::int64_t side, std::int64_t factor) {
    Half half(run, component, factor);
    const std::int64_t given = half.given, made = half.made;
    const std::int64_t height = array.shape[2] / given, width = array.shape[3] / given;
    const Small small(half, array, shrink_of(height, width, side));
    Outputs whole;
    for (const Span& down : spans(height, side, made)) {
        for (const Span& across : spans(width, side, made)) {
            const Floats part = cut(array, down.range.times(given), across.range.times(given));
            const Outputs outputs = half.run(part);
            const Outputs missing = small.missing(down.range, across.range);
            for (const auto& [name, values] : outputs) {
                Floats& all = whole[name];
                if (all.values.empty()) {
                    all = Floats({1, values.shape[1], height * made, width * made});
                }
                lay(values, missing.at(name), down, across, made, all);
            }
        }
    }
    return whole;
}

}  // namespace fluxdeploy
