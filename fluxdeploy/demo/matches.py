"""Whether a filled or changed picture is right, by what `scorer.look` sees in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fluxdeploy.demo.edits import Edit
from fluxdeploy.demo.holes import Hole
from fluxdeploy.demo.scenes import SIZES, Placed, draw
from fluxdeploy.demo.scorer import Seen, Sight, look

__all__ = ["EditMatch", "FillMatch", "match_edit", "match_fill"]

Array = np.ndarray[Any, np.dtype[Any]]

_MOST_STRAY = 0.02
_MOST_SHIFT = 4.0
"""Farthest that a thing may have moved, in pixels: a quarter of a token."""

_MOST_CHANGE = 8.0
"""Largest mean change outside of the hole, of 255."""


@dataclass(frozen=True)
class FillMatch:
    """inside: the hole shows what the prompt asks for, and nothing else. outside: all that was
    there is there, where it was and as large, on the same background.

    change: the mean difference outside of the hole, of 255.
    """

    inside: bool
    outside: bool
    change: float

    @property
    def right(self) -> bool:
        """Both are right, and the outside has hardly changed."""
        return self.inside and self.outside and self.change <= _MOST_CHANGE


@dataclass(frozen=True)
class EditMatch:
    """changed: what the words name is as they say. kept: all else is as it was, where it was."""

    changed: bool
    kept: bool

    @property
    def right(self) -> bool:
        """Both are."""
        return self.changed and self.kept


def match_fill(picture: Array, hole: Hole) -> FillMatch:
    """Compare a picture, uint8 [H, W, 3], with what fills the hole of a drawing."""
    sight = look(picture)
    around = [placed for placed in hole.drawing.things if placed is not hole.thing]
    kept = [_find(sight, placed) for placed in around]
    fresh = [seen for seen in sight.things if not any(seen is old for old in kept)]
    filled = not fresh if hole.thing is None else len(fresh) == 1 and _fills(fresh[0], hole)
    outside = ~hole.mask
    change = np.abs(picture.astype(np.float32) - draw(hole.drawing))[outside].mean()
    return FillMatch(
        inside=filled and sight.stray <= _MOST_STRAY,
        outside=all(kept) and sight.background == hole.drawing.background,
        change=float(change),
    )


def _fills(seen: Seen, hole: Hole) -> bool:
    assert hole.thing is not None
    thing = hole.thing.thing
    sized = thing.size is None or _size(seen.radius) == thing.size
    inside = bool(hole.mask[int(seen.y), int(seen.x)])
    return (seen.colour, seen.shape) == (thing.colour, thing.shape) and sized and inside


def match_edit(picture: Array, edit: Edit) -> EditMatch:
    """Compare a picture, uint8 [H, W, 3], with what the words make of a drawing."""
    sight = look(picture)
    before, after = edit.before, edit.after
    pairs = list(zip(before.things, after.things, strict=True))
    same = [new for old, new in pairs if old == new]
    other = [new for old, new in pairs if old != new]
    ground = sight.background == after.background
    alone = len(sight.things) == len(after.things) and sight.stray <= _MOST_STRAY
    repainted = before.background != after.background
    return EditMatch(
        changed=all(_find(sight, placed) for placed in other) and (ground or not repainted),
        kept=all(_find(sight, placed) for placed in same) and alone and (ground or repainted),
    )


def _find(sight: Sight, placed: Placed) -> Seen | None:
    """What looks like a thing where it lies, and is of its size."""
    for seen in sight.things:
        alike = (seen.colour, seen.shape) == (placed.thing.colour, placed.thing.shape)
        left, top, right, bottom = seen.box
        shift = max(abs((left + right) / 2 - placed.x), abs((top + bottom) / 2 - placed.y))
        if alike and shift <= _MOST_SHIFT and _size(seen.radius) == _size(placed.radius):
            return seen
    return None


def _size(radius: float) -> str:
    return min(SIZES, key=lambda name: abs(SIZES[name] - radius))
