"""The VAE in tiles, where memory does not hold a whole picture.

Tiles overlap. Of an overlap, what is nearest to a tile's edge is cut away, and the rest is mixed
along a smooth ramp. Group norms and attention look at all that they are given, so that a tile is
not quite what the whole picture would have there: its colors differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from engines.base import Array
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.host.components import Run
from fluxdeploy.machine import read_memory

__all__ = ["SIDE", "needs_tiles", "run_in_tiles", "tiled", "vae_cost"]

SIDE = 96
"""Latents of a tile's side. One size, whatever memory is free: a seed gives one of two pictures,
the one that is made whole or the one in tiles."""

_CUT, _RAMP = 8, 16
"""Latents on each side of an overlap that are cut away, and those between that are mixed."""

_SHARE = 0.8
"""Of the free memory, what a run may take: its figure is an estimate."""

_INPUTS = {"vae_decoder": "latents", "vae_encoder": "images"}

_DONE = {"vae_decoder": "decoded", "vae_encoder": "encoded"}


def tiled(
    run: Run,
    manifest: Manifest,
    tell: Callable[[str], None],
    free_memory: Callable[[], int | None] | None = None,
) -> Run:
    """`run` for one call, with the VAE in tiles where free memory does not hold the whole.

    What the first picture of a size does, all of that size do. A bundle that does not record what
    its VAE takes, or is not for CPUs, has it run whole. The smallest that there is is a tile, which
    runs even where memory seems not to hold it.

    tell: called once for each half of the VAE and size, with a sentence on its tiles.
    """
    factor = manifest.latents.spatial_factor
    free = free_memory or (lambda: read_memory().available)
    decided: dict[tuple[str, int, int], bool] = {}

    def decide(component: str, height: int, width: int, cost: int) -> bool:
        in_tiles = needs_tiles(height, width, cost * factor**2, free())
        if in_tiles:
            tell(_sentence(component, height * factor, width * factor, cost, factor))
        return in_tiles

    def in_tiles(component: str, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        cost = vae_cost(manifest, component)
        if cost is None:
            return run(component, inputs)
        array = inputs[_INPUTS[component]]
        unit = 1 if component == "vae_decoder" else factor
        key = (component, array.shape[2] // unit, array.shape[3] // unit)
        if key not in decided:
            decided[key] = decide(*key, cost)
        if not decided[key]:
            return run(component, inputs)
        return run_in_tiles(run, component, array, SIDE, factor)

    return in_tiles


def vae_cost(manifest: Manifest, component: str) -> int | None:
    """Bytes a pixel that a half of the VAE takes on a CPU; None where it is not recorded."""
    recorded = manifest.provenance.get("vae_bytes_per_pixel")
    cost = recorded.get(component) if isinstance(recorded, Mapping) else None
    return cost if component in _INPUTS and type(cost) is int and cost > 0 else None


def needs_tiles(height: int, width: int, cost: int, free: int | None) -> bool:
    """Whether height x width latents, of `cost` bytes each, are more than `free` bytes hold.

    Never where one tile is all of them, or where it is not known what is free.
    """
    if free is None or max(height, width) <= SIDE:
        return False
    return height * width * cost > _SHARE * free


def _sentence(component: str, height: int, width: int, cost: int, factor: int) -> str:
    side = SIDE * factor
    need = height * width * cost / _SHARE
    return (
        f"The {width}x{height} picture was {_DONE[component]} in tiles of "
        f"{min(side, width)}x{min(side, height)} pixels, since the whole takes {need / 1e9:.1f} GB "
        "of free memory: colors can differ from those of the whole. Free memory, set low_vram, or "
        "ask for a smaller size."
    )


def run_in_tiles(
    run: Run, component: str, array: Array, side: int, factor: int
) -> dict[str, NDArray[np.float32]]:
    """The outputs of one picture or of its latents, [1, C, ...], made of tiles of `side` latents.

    factor: pixels of a latent's side.
    """
    name = _INPUTS[component]
    given, made = (1, factor) if component == "vae_decoder" else (factor, 1)
    rows = _spans(array.shape[2] // given, side, made)
    columns = _spans(array.shape[3] // given, side, made)
    whole: dict[str, NDArray[np.float32]] = {}
    for top, tall, down in rows:
        for left, wide, across in columns:
            part = array[
                :, :, top * given : (top + tall) * given, left * given : (left + wide) * given
            ]
            outputs = run(component, {name: np.ascontiguousarray(part)})
            weights = down[:, None] * across
            for key, values in outputs.items():
                if key not in whole:
                    size = (array.shape[2] // given * made, array.shape[3] // given * made)
                    whole[key] = np.zeros((*values.shape[:2], *size), np.float32)
                whole[key][
                    :, :, top * made : (top + tall) * made, left * made : (left + wide) * made
                ] += weights * values
    return whole


def _spans(length: int, side: int, made: int) -> list[tuple[int, int, NDArray[np.float32]]]:
    """Where tiles of one size begin along an axis, that size, and the weight of what each makes.

    Weights are float32 [size * made]; those of all tiles add up to 1 everywhere.
    """
    if side >= length:
        return [(0, length, np.ones(length * made, np.float32))]
    count = -(-(length - 2 * _CUT - _RAMP) // (side - 2 * _CUT - _RAMP))
    starts = [round(index * (length - side) / (count - 1)) for index in range(count)]
    # The middles of the overlaps, where one tile's share becomes the next one's.
    middles = [(start + side + after) / 2 for start, after in itertools.pairwise(starts)]
    spans = []
    for index, start in enumerate(starts):
        places = start + (np.arange(side * made) + 0.5) / made
        weights = np.ones(side * made)
        if index > 0:
            weights *= _rise(places - middles[index - 1])
        if index < count - 1:
            weights *= 1 - _rise(places - middles[index])
        spans.append((start, side, weights.astype(np.float32)))
    return spans


def _rise(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 0 to 1 around a middle, without a corner at either end."""
    x = np.clip(distance / _RAMP + 0.5, 0.0, 1.0)
    smooth: NDArray[np.float64] = x * x * (3 - 2 * x)
    return smooth
