"""The VAE in tiles: when, how large, and that no seam or pixel is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from engines.base import Array
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.host.tiles import run_in_tiles, tile_side, tiled


class Vae:
    """A VAE that looks at no neighbour, and counts the largest that it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, component: str, inputs: Mapping[str, Array]) -> dict[str, np.ndarray]:
        (array,) = inputs.values()
        self.shapes.append(array.shape)
        if component == "vae_decoder":
            return {"images": np.tanh(array[:, :3]).repeat(8, axis=2).repeat(8, axis=3)}
        small = array[:, :, ::8, ::8]
        return {"mean": small, "logvar": -small}


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("height", "width"), [(64, 200), (130, 65), (97, 96), (300, 64)])
def test_tiles_of_what_is_local_make_the_whole(height: int, width: int) -> None:
    vae, latents = Vae(), numbers(1, 4, height, width)
    expected = vae("vae_decoder", {"latents": latents})["images"]
    vae.shapes.clear()
    found = run_in_tiles(vae, "vae_decoder", latents, 64, 8)["images"]
    assert np.abs(found - expected).max() < 1e-6
    assert len(set(vae.shapes)) == 1, "one size for all tiles"
    assert max(vae.shapes[0][2:]) <= 64

    pixels = numbers(1, 3, height * 8, width * 8)
    whole = vae("vae_encoder", {"images": pixels})
    for name, values in run_in_tiles(vae, "vae_encoder", pixels, 64, 8).items():
        assert np.abs(values - whole[name]).max() < 1e-6


def test_what_a_tile_makes_at_its_edge_is_not_seen() -> None:
    vae, latents = Vae(), numbers(1, 4, 64, 200)

    def damaged(component: str, inputs: Mapping[str, Array]) -> dict[str, np.ndarray]:
        images = vae(component, inputs)["images"].copy()
        images[..., :64] = images[..., -64:] = 1e3  # 8 latents on the left and the right
        return {"images": images}

    inside = np.s_[..., 64:-64]
    found = run_in_tiles(damaged, "vae_decoder", latents, 64, 8)["images"][inside]
    assert np.abs(found - vae("vae_decoder", {"latents": latents})["images"][inside]).max() < 1e-6


def test_the_whole_where_it_fits_and_else_the_largest_tiles() -> None:
    assert tile_side(256, 256, 1000, None) is None
    assert tile_side(256, 256, 1000, 82_000_000) is None
    assert tile_side(256, 256, 1000, 80_000_000) == 192
    assert tile_side(256, 256, 1000, 30_000_000) == 128
    assert tile_side(512, 512, 1000, 1) == 64


def test_the_bundle_tells_when_tiles_are_needed(manifest: Manifest) -> None:
    latents = numbers(1, 4, 100, 100)

    def runs(provenance: Mapping[str, object], free: int) -> int:
        vae = Vae()
        given = replace(manifest, provenance=provenance)
        tiled(vae, given, lambda: free)("vae_decoder", {"latents": latents})
        return len(vae.shapes)

    recorded = {"vae_bytes_per_pixel": {"vae_decoder": 1000}}
    assert runs(recorded, 1_000_000_000) == 1
    assert runs(recorded, 600_000_000) > 1
    for without in ({}, {"vae_bytes_per_pixel": 3}, {"vae_bytes_per_pixel": {"vae_decoder": "x"}}):
        assert runs(without, 1) == 1
