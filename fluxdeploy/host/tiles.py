"""The VAE in tiles, where memory does not hold a whole picture.

Tiles overlap. Of an overlap, what is nearest to a tile's edge is cut away, and the rest is mixed
along a smooth ramp. Group norms and attention look at all that they are given, so that a tile is
not quite what the whole picture would have there; of the tiles that fit, the largest are taken.
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

__all__ = ["run_in_tiles", "tile_side", "tiled"]

_SIDES = (192, 160, 128, 96, 64)
"""Latents of a tile's side, largest first."""

_CUT, _RAMP = 8, 16
"""Latents on each side of an overlap that are cut away, and those between that are mixed."""

_SHARE = 0.8
"""Of the free memory, what a run may take: its figure is an estimate."""

_INPUTS = {"vae_decoder": "latents", "vae_encoder": "images"}


def tiled(run: Run, manifest: Manifest, free_memory: Callable[[], int | None] | None = None) -> Run:
    """`run`, with the VAE in tiles where the memory that is free then does not hold the whole.

    A bundle that does not record what its VAE takes, or is not for CPUs, has it run whole.
    """
    factor = manifest.latents.spatial_factor
    free = free_memory or (lambda: read_memory().available)
    recorded = manifest.provenance.get("vae_bytes_per_pixel")
    costs = recorded if isinstance(recorded, Mapping) else {}

    def in_tiles(component: str, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        cost = costs.get(component)
        if component not in _INPUTS or type(cost) is not int or cost <= 0:
            return run(component, inputs)
        decoding = component == "vae_decoder"
        array = inputs[_INPUTS[component]]
        unit = 1 if decoding else factor
        height, width = array.shape[2] // unit, array.shape[3] // unit
        side = tile_side(height, width, cost * factor**2, free())
        if side is None:
            return run(component, inputs)
        return run_in_tiles(run, component, array, side, factor)

    return in_tiles


def tile_side(height: int, width: int, cost: int, free: int | None) -> int | None:
    """Latents of a tile's side for height x width latents; None where the whole fits.

    cost: bytes a latent. free: bytes, None where unknown. The smallest tile where none fits.
    """
    if free is None or height * width * cost <= _SHARE * free:
        return None
    for side in _SIDES:
        if min(side, height) * min(side, width) * cost <= _SHARE * free:
            return side
    return _SIDES[-1]


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
