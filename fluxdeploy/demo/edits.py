"""Colours of a scene changed by words, as the Kontext demo learns them and is scored on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fluxdeploy.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    Drawing,
    Placed,
    Scene,
    Split,
    arrange,
    is_held_out,
    sample_scene,
)

__all__ = ["Edit", "sample_edit"]

_GROUNDS = 0.25
_NAMED = 0.3


@dataclass(frozen=True)
class Edit:
    """A drawing, the words that change it, and what it is then."""

    before: Drawing
    after: Drawing
    prompt: str


def sample_edit(rng: np.random.Generator, height: int, width: int, split: Split = "train") -> Edit:
    """Another colour for one thing of a random scene, or for its background.

    What it becomes has no two things that are the same. In the held-out split, training has never
    seen the scene before the change.
    """
    while True:
        edit = _change(arrange(sample_scene(rng, split), height, width, rng), rng)
        things = {(placed.thing.colour, placed.thing.shape) for placed in edit.after.things}
        if len(things) < len(edit.after.things):
            continue
        if split == "held-out" or not is_held_out(_scene(edit.after)):
            return edit


def _scene(drawing: Drawing) -> Scene:
    return Scene(tuple(placed.thing for placed in drawing.things))


def _change(before: Drawing, rng: np.random.Generator) -> Edit:
    if rng.random() < _GROUNDS:
        ground = _other(rng, BACKGROUNDS, before.background)
        return Edit(before, replace(before, background=ground), _say(rng, "background", ground))
    index = int(rng.integers(len(before.things)))
    thing = before.things[index].thing
    name = thing.shape
    alike = [placed for placed in before.things if placed.thing.shape == thing.shape]
    if len(alike) > 1 or rng.random() < _NAMED:
        name = f"{thing.colour} {thing.shape}"
    colour = _other(rng, COLOURS, thing.colour)
    return Edit(before, _painted(before, index, colour), _say(rng, name, colour))


def _other(rng: np.random.Generator, options: Any, now: str) -> str:
    return str(rng.choice([option for option in options if option != now]))


def _say(rng: np.random.Generator, name: str, colour: str) -> str:
    words = f"make the {name} {colour}", f"turn the {name} {colour}"
    return words[int(rng.integers(len(words)))]


def _painted(drawing: Drawing, index: int, colour: str) -> Drawing:
    things: list[Placed] = list(drawing.things)
    things[index] = replace(things[index], thing=replace(things[index].thing, colour=colour))
    return replace(drawing, things=tuple(things))
