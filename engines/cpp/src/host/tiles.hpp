// The VAE in tiles, where memory does not hold a whole picture.
//
// Tiles overlap. Of an overlap, what is nearest to a tile's edge is cut away, and the rest is mixed
// along a smooth ramp. Group norms and attention look at all that they are given, so that a tile
// alone has other colours than the whole picture would have there. Most of that is taken back: the
// picture is also run at a size that fits, the whole and the part of each tile, and a tile gets the
// difference. The numbers are those of fluxdeploy/host/tiles.py.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "host/prompts.hpp"

namespace fluxdeploy {

// `run` for one call, with the VAE in tiles where free memory does not hold the whole. What the
// first picture of a size does, all of that size do. Where the bundle does not record what its VAE
// takes, it is run whole. `tell` is called once for each half of the VAE and size that is, with a
// sentence. `manifest` outlives it.
Run tiled(Run run, const Manifest& manifest, std::function<void(const std::string&)> tell,
          std::function<std::optional<std::int64_t>()> free_memory);

// The outputs of one picture or of its latents, [1, C, ...], made of tiles of `side` latents;
// `factor` are the pixels of a latent's side.
Outputs run_in_tiles(const Run& run, const std::string& component, const Floats& array,
                     std::int64_t side, std::int64_t factor);

}  // namespace fluxdeploy
