"""The VAE in tiles: when, how large, and that no seam or pixel is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines import open_engine
from engines.base import Array
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.host import tiles
from fluxdeploy.host.tiles import needs_tiles, run_in_tiles, tiled
from fluxdeploy.sampling.latents import sample_posterior
from fluxdeploy.similarity import psnr


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
    assert max(np.prod(shape[2:]) for shape in vae.shapes) <= 64**2, "no more than a tile"
    sizes = Counter(shape[2:] for shape in vae.shapes)
    assert max(sizes.values()) > 1, "one size for all tiles"

    pixels = numbers(1, 3, height * 8, width * 8)
    whole = vae("vae_encoder", {"images": pixels})
    for name, values in run_in_tiles(vae, "vae_encoder", pixels, 64, 8).items():
        assert np.abs(values - whole[name]).max() < 1e-6


def test_tiles_are_no_larger_than_their_number_asks_for() -> None:
    vae = Vae()
    run_in_tiles(vae, "vae_decoder", numbers(1, 4, 256, 150), 112, 8)
    sizes = Counter(shape[2:] for shape in vae.shapes)
    # They overlap by 32: 3 x 107 and 2 x 91 are 64 and 32 more than the sides.
    assert sizes[107, 91] == 6


def test_what_a_tile_makes_at_its_edge_is_not_seen() -> None:
    vae, latents = Vae(), numbers(1, 4, 64, 200)

    def damaged(component: str, inputs: Mapping[str, Array]) -> dict[str, np.ndarray]:
        images = vae(component, inputs)["images"].copy()
        if images.shape[2] == 512:  # not where the picture is smaller
            images[..., :64] = images[..., -64:] = 1e3  # 8 latents on the left and the right
        return {"images": images}

    inside = np.s_[..., 64:-64]
    found = run_in_tiles(damaged, "vae_decoder", latents, 64, 8)["images"][inside]
    assert np.abs(found - vae("vae_decoder", {"latents": latents})["images"][inside]).max() < 1e-6


def test_the_whole_where_it_fits_and_where_a_tile_is_all() -> None:
    assert not needs_tiles(256, 256, 1000, None)
    assert not needs_tiles(256, 256, 1000, 82_000_000)
    assert needs_tiles(256, 256, 1000, 80_000_000)
    assert needs_tiles(113, 112, 1000, 1), "a tile runs, whatever is free"
    assert not needs_tiles(112, 112, 1000, 1)
    assert not needs_tiles(224, 56, 1000, 1)


def test_a_tile_gets_what_the_rest_of_the_picture_changes() -> None:
    """Norms look at all of a picture: their means here, which differ from tile to tile."""

    def normed(component: str, inputs: Mapping[str, Array]) -> dict[str, np.ndarray]:
        latents = inputs["latents"][:, :3]
        images = latents - latents.mean(axis=(2, 3), keepdims=True)
        return {"images": images.repeat(8, axis=2).repeat(8, axis=3)}

    latents = numbers(1, 4, 96, 200) + np.linspace(0, 3, 200, dtype=np.float32)
    whole = normed("", {"latents": latents})["images"]
    found = run_in_tiles(normed, "vae_decoder", latents, 64, 8)["images"]
    assert np.abs(found - whole).max() < 0.05, "1 is what the mean of a tile is off"


class Call:
    """A VAE in a call of the pipeline, of a bundle that records a cost of 1000 bytes a pixel."""

    def __init__(self, manifest: Manifest, provenance: Mapping[str, object], *free: int) -> None:
        self.vae, self.told, left = Vae(), [], list(free)
        given = replace(manifest, provenance=provenance)
        self.run = tiled(self.vae, given, self.told.append, lambda: left.pop(0))


RECORDED = {"vae_bytes_per_pixel": {"vae_decoder": 1000, "vae_encoder": 1000}}


def test_the_bundle_tells_when_tiles_are_needed(manifest: Manifest) -> None:
    latents = {"latents": numbers(1, 4, 120, 120)}
    for provenance, free, runs in (
        (RECORDED, 1_200_000_000, 1),
        (RECORDED, 1_100_000_000, 9),
        (RECORDED, 1, 9),
        ({}, 1, 1),
        ({"vae_bytes_per_pixel": 3}, 1, 1),
        ({"vae_bytes_per_pixel": {"vae_decoder": "x"}}, 1, 1),
    ):
        call = Call(manifest, provenance, free)
        call.run("vae_decoder", latents)
        assert len(call.vae.shapes) == runs, "four tiles, and what they lack"
        assert len(call.told) == (runs > 1)


def test_the_pictures_of_a_call_are_made_alike_and_told_of_once(manifest: Manifest) -> None:
    latents = {"latents": numbers(1, 4, 224, 64)}
    call = Call(manifest, RECORDED, 1, 10**12)
    first, second = (call.run("vae_decoder", latents)["images"] for _ in range(2))
    assert np.array_equal(first, second)
    (told,) = call.told
    assert told.startswith("The 512x1792 picture was decoded in tiles of 512x768 pixels")
    assert "smaller size" in told

    call.run("vae_encoder", {"images": numbers(1, 3, 1792, 512)})
    assert len(call.told) == 1, "that much was free then"


def test_the_demo_in_tiles_is_near_to_the_whole(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/run.md states, with smaller tiles: two, of an odd number of rows."""
    monkeypatch.setattr(tiles, "SIDE", 64)
    bundle = open_bundle(demo_bundle)
    source = Image.open(Path(__file__).parents[2] / "docs" / "demo.png").convert("RGB")
    pixels = np.asarray(source.resize((720, 408)), np.float32) / 127.5 - 1
    pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
    with ExitStack() as stack:
        engines = {
            half: stack.enter_context(closing(open_engine(bundle, half)))
            for half in ("vae_encoder", "vae_decoder")
        }

        def run(component: str, inputs: Mapping[str, Array]) -> dict[str, np.ndarray]:
            return {k: np.array(v) for k, v in engines[component].run(inputs).items()}

        told: list[str] = []
        given = replace(bundle.manifest, provenance=RECORDED)
        in_tiles = tiled(run, given, told.append, lambda: 1)
        whole = run("vae_encoder", {"images": pixels})
        parts = in_tiles("vae_encoder", {"images": pixels})
        epsilon = numbers(*whole["mean"].shape)
        latents = [sample_posterior(e["mean"], e["logvar"], epsilon) for e in (whole, parts)]
        off = np.linalg.norm(latents[1] - latents[0]) / np.linalg.norm(latents[0])
        assert off < 0.15, "the same noise at the same places"

        image = run("vae_decoder", {"latents": latents[0]})["images"]
        found = in_tiles("vae_decoder", {"latents": latents[0]})["images"]
    assert found.shape == image.shape
    first, second = (np.clip(x[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1) for x in (image, found))
    assert psnr(first, second) > 25
    assert len(told) == 2
