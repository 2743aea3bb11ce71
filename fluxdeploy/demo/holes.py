"""Scenes with a hole that is to be filled, as the Fill demo learns them and is scored on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fluxdeploy.demo.scenes import (
    Drawing,
    Placed,
    Scene,
    Split,
    arrange,
    caption,
    coverage,
    sample_scene,
)

__all__ = ["Hole", "sample_hole"]

Array = np.ndarray[Any, np.dtype[Any]]

_EMPTY = 0.15
_ALONE = 0.4
_WIDE = 0.2


@dataclass(frozen=True)
class Hole:
    """A hole in a drawing.

    drawing: what the picture shows once it is filled. mask: bool [H, W], true where to paint.
    thing: what the prompt asks for in the hole; None where it is to be background alone.
    """

    drawing: Drawing
    mask: Array
    thing: Placed | None
    prompt: str


def sample_hole(rng: np.random.Generator, height: int, width: int, split: Split = "train") -> Hole:
    """A box or a blob over one thing of a random scene.

    The prompt describes the whole picture, or the thing in the hole alone. Or it leaves that thing
    out: then background is to go on through the hole. In the held-out split, training has never
    seen the scene, and the hole cuts no other thing: what a prompt leaves out of one that is cut,
    nobody could tell.
    """
    while True:
        hole = _sample(rng, height, width, split)
        if split == "train" or not _cuts(hole):
            return hole


def _cuts(hole: Hole) -> bool:
    height, width = hole.mask.shape
    for other in hole.drawing.things:
        covered = coverage(other.thing.shape, height, width, other.x, other.y, other.radius)
        if other is not hole.thing and covered[hole.mask].any():
            return True
    return False


def _sample(rng: np.random.Generator, height: int, width: int, split: Split) -> Hole:
    scene = sample_scene(rng, split)
    drawing = arrange(scene, height, width, rng)
    thing = drawing.things[int(rng.integers(len(drawing.things)))]
    mask = (_box if rng.random() < 0.5 else _blob)(rng, thing, height, width)
    if len(scene.things) == 2 and rng.random() < _EMPTY:
        rest = tuple(placed for placed in drawing.things if placed is not thing)
        shown = Scene((rest[0].thing,), background=scene.background)
        return Hole(replace(drawing, things=rest), mask, None, caption(shown, rng))
    if rng.random() < _ALONE:
        scene = Scene((thing.thing,), background=scene.background)
    return Hole(drawing, mask, thing, caption(scene, rng))


def _box(rng: np.random.Generator, thing: Placed, height: int, width: int) -> Array:
    left, top, right, bottom = thing.radius + _margins(rng, 4)
    mask = np.zeros((height, width), bool)
    rows = slice(max(0, round(thing.y - top)), round(thing.y + bottom))
    columns = slice(max(0, round(thing.x - left)), round(thing.x + right))
    mask[rows, columns] = True
    return mask


def _blob(rng: np.random.Generator, thing: Placed, height: int, width: int) -> Array:
    turn = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    heights, phases = rng.uniform(0, (0.15, 2 * math.pi), (3, 2)).T[..., None]
    waves = (heights * np.cos(np.outer((2, 3, 5), turn) + phases)).sum(0)
    # The corners of a square lie farthest from its centre, and the waves cut some of the margin.
    reach = math.sqrt(2) * thing.radius + _margins(rng, 1) + thing.radius * (waves - waves.min())
    points = np.stack([thing.x + reach * np.cos(turn), thing.y + reach * np.sin(turn)], 1)
    mask = Image.new("1", (width, height))
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in points], fill=1)
    return np.asarray(mask)


def _margins(rng: np.random.Generator, count: int) -> Array:
    return 2 + rng.uniform(0, 40 if rng.random() < _WIDE else 12, count)
