"""The VAE in tiles, where memory does not hold a whole picture.

Tiles overlap. Of an overlap, what is nearest to a tile's edge is cut away, and the rest is mixed
along a smooth ramp. Group norms and attention look at all that they are given, so that a tile alone
has other colors than the whole picture would have there. Most of that is taken back: the picture is
also run at a size that fits, the whole and the part of each tile, and a tile gets the difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from engines.base import Array
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.host.components import Run
from fluxdeploy.machine import read_memory

__all__ = ["SIDE", "is_cost", "needs_tiles", "run_in_tiles", "tiled", "vae_cost"]

SIDE = 112
"""Latents of a tile's side at most. No smaller where less memory is free: a seed gives one of two
pictures, the one that is made whole or the one in tiles."""

_CUT, _RAMP = 8, 16
"""Latents on each side of an overlap that are cut away, and those between that are mixed."""

_SHARE = 0.8
"""Of the free memory, what a run may take: its figure is an estimate."""

_MOST = 1 << 40

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
    return cost if component in _INPUTS and is_cost(cost) and cost > 0 else None


def is_cost(value: object) -> TypeGuard[int]:
    """Whether what a manifest has under `provenance` can be bytes of a pixel or of a token."""
    return type(value) is int and 0 <= value <= _MOST


def needs_tiles(height: int, width: int, cost: int, free: int | None) -> bool:
    """Whether height x width latents, of `cost` bytes each, are more than `free` bytes hold.

    Never where they are no more than a tile's, or where it is not known what is free.
    """
    if free is None or height * width <= SIDE**2:
        return False
    return height * width * cost > _SHARE * free


def _sentence(component: str, height: int, width: int, cost: int, factor: int) -> str:
    across, down = (_fit(length // factor, SIDE)[0] * factor for length in (width, height))
    need = height * width * cost / _SHARE
    return (
        f"The {width}x{height} picture was {_DONE[component]} in tiles of "
        f"{across}x{down} pixels, since the whole takes {need / 1e9:.1f} GB "
        "of free memory: colors can differ from those of the whole. Free memory, set low_vram, or "
        "ask for a smaller size."
    )


def run_in_tiles(
    run: Run, component: str, array: Array, side: int, factor: int
) -> dict[str, NDArray[np.float32]]:
    """The outputs of one picture or of its latents, [1, C, ...], made of tiles.

    side: latents of a tile's side, at most. factor: pixels of a latent's side.
    """
    name = _INPUTS[component]
    given, made = (1, factor) if component == "vae_decoder" else (factor, 1)
    source: NDArray[np.float32] = np.asarray(array, np.float32)
    height, width = source.shape[2] // given, source.shape[3] // given
    small = _Small(run, component, source, _shrink(height, width, side), given, made)
    whole: dict[str, NDArray[np.float32]] = {}
    for top, tall, down in _spans(height, side, made):
        for left, wide, across in _spans(width, side, made):
            part = _cut(source, given, top, top + tall, left, left + wide)
            outputs = run(component, {name: np.ascontiguousarray(part)})
            missing = small.missing((top, tall), (left, wide))
            weights = down[:, None] * across
            for key, values in outputs.items():
                if key not in whole:
                    size = (height * made, width * made)
                    whole[key] = np.zeros((*values.shape[:2], *size), np.float32)
                place = _cut(whole[key], made, top, top + tall, left, left + wide)
                place += weights * (values + missing[key])
    return whole


def _shrink(height: int, width: int, side: int) -> int:
    """How many times smaller a side must be, for all of a picture to be no larger than a tile."""
    shrink = 2
    while -(-height // shrink) * -(-width // shrink) > side**2:
        shrink += 1
    return shrink


class _Small:
    """The whole picture, made small enough to be run at once, and what tiles lack beside it.

    A tile is also run as small, without the rest. What the rest would change there is nearly what
    it would change in the tile: it is the statistics of norms, and so smooth.
    """

    def __init__(
        self,
        run: Run,
        component: str,
        array: NDArray[np.float32],
        shrink: int,
        given: int,
        made: int,
    ) -> None:
        self._run, self._component = run, component
        self._shrink, self._given, self._made = shrink, given, made
        rest = [(0, -size % (shrink * given)) for size in array.shape[2:]]
        padded = np.pad(array, [(0, 0), (0, 0), *rest], mode="edge")
        self._input = _means(padded, shrink)
        self._outputs = run(component, {_INPUTS[component]: self._input})

    def missing(
        self, rows: tuple[int, int], columns: tuple[int, int]
    ) -> dict[str, NDArray[np.float32]]:
        """What to add to the outputs of a tile, of (first, count) rows and columns of latents."""
        (top, bottom, down), (left, right, across) = map(self._span, (rows, columns))
        part = _cut(self._input, self._given, top, bottom, left, right)
        inputs = {_INPUTS[self._component]: np.ascontiguousarray(part)}
        alone = self._run(self._component, inputs)
        found: dict[str, NDArray[np.float32]] = {}
        for key, values in alone.items():
            there = _cut(self._outputs[key], self._made, top, bottom, left, right)
            change = down @ _means(there - values, self._made) @ across.T
            found[key] = np.asarray(change, np.float32)
        return found

    def _span(self, span: tuple[int, int]) -> tuple[int, int, NDArray[np.float32]]:
        """The small latents of a tile's, and the weights of a line from each to the next."""
        start, count = span
        first, last = start // self._shrink, -(-(start + count) // self._shrink)
        pixels = (start * self._made + np.arange(count * self._made) + 0.5) / self._made
        places = np.clip(pixels / self._shrink - 0.5 - first, 0, last - first - 1)
        near = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(last - first)))
        return first, last, near.astype(np.float32)


def _cut(
    array: NDArray[np.float32], unit: int, top: int, bottom: int, left: int, right: int
) -> NDArray[np.float32]:
    """Some rows and columns of an array [1, C, ...], in units of so many."""
    return array[:, :, top * unit : bottom * unit, left * unit : right * unit]


def _means(array: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """The means of blocks of size x size, of an array [1, C, ...] of whole blocks."""
    batch, channels, height, width = array.shape
    blocks = array.reshape(batch, channels, height // size, size, width // size, size)
    means: NDArray[np.float32] = blocks.mean(axis=(3, 5), dtype=np.float32)
    return means


def _spans(length: int, side: int, made: int) -> list[tuple[int, int, NDArray[np.float32]]]:
    """Where tiles of one size begin along an axis, that size, and the weight of what each makes.

    side: the largest that a tile may be. Weights are float32 [size * made]; those of all tiles add
    up to 1 everywhere.
    """
    side, count = _fit(length, side)
    if count == 1:
        return [(0, length, np.ones(length * made, np.float32))]
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


def _fit(length: int, side: int) -> tuple[int, int]:
    """The smallest size of tiles along an axis that takes no more tiles than `side`, and how many.

    Tiles then overlap by no more than they must: what lies under two is computed twice.
    """
    if side >= length:
        return length, 1
    overlap = 2 * _CUT + _RAMP
    count = -(-(length - overlap) // (side - overlap))
    return -(-(length + (count - 1) * overlap) // count), count


def _rise(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 0 to 1 around a middle, without a corner at either end."""
    x = np.clip(distance / _RAMP + 0.5, 0.0, 1.0)
    smooth: NDArray[np.float64] = x * x * (3 - 2 * x)
    return smooth
