"""Scenes that the demo models draw: one or two flat shapes, described in words.

A `Scene` is what a caption says. `arrange` decides what it leaves open, and `draw` paints the
result. The demo checkpoints were trained on nothing else, and `fluxdeploy.demo.scorer` reads the
same vocabulary back from a picture.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "EMBERS",
    "PLACES",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Drawing",
    "Placed",
    "Scene",
    "Split",
    "Thing",
    "arrange",
    "caption",
    "coverage",
    "draw",
    "in_embers",
    "is_held_out",
    "sample_scene",
]

Array = np.ndarray[Any, np.dtype[Any]]
Split = Literal["train", "held-out"]

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (252, 214, 40),
    "green": (48, 150, 64),
    "cyan": (50, 205, 215),
    "blue": (30, 85, 205),
    "purple": (125, 45, 165),
    "pink": (250, 140, 185),
}
"""What things are painted in: sRGB, 0 to 255."""

BACKGROUNDS = {
    "white": (245, 245, 245),
    "gray": (130, 130, 130),
    "black": (20, 20, 20),
    "beige": (222, 202, 166),
}

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring")

SIZES = {"small": 14.0, "large": 21.0}
"""Half the larger side of a thing's bounding box, in pixels."""

RELATIONS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
"""Where the first thing lies, seen from the second, and the words for it."""

PLACES: dict[str, tuple[float | None, float | None]] = {
    "in the center": (0.5, 0.5),
    "at the top": (None, 0.0),
    "at the bottom": (None, 1.0),
    "on the left": (0.0, None),
    "on the right": (1.0, None),
    "in the top left corner": (0.0, 0.0),
    "in the top right corner": (1.0, 0.0),
    "in the bottom left corner": (0.0, 1.0),
    "in the bottom right corner": (1.0, 1.0),
}
"""Where a single thing's centre lies across (x, y) the room it has: 0 left or top, 1 right or
bottom, None anywhere."""

EMBERS = {"green": "orange", "cyan": "yellow", "blue": "red", "purple": "pink"}
"""What the demo's LoRA paints cold colours in; warm ones stay, and the background is black."""

_GRID = 16
_MARGIN = 3.0
_GAP = 4.0
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """A shape with a colour; `size` None leaves it open."""

    colour: str
    shape: str
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """One thing, perhaps with a place, or two, perhaps with a relation; None leaves it open."""

    things: tuple[Thing, ...]
    relation: str | None = None
    place: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Placed:
    """A thing with its centre and half extent, in pixels."""

    thing: Thing
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Drawing:
    """All that is needed to paint a scene."""

    height: int
    width: int
    background: str
    things: tuple[Placed, ...]


def sample_scene(rng: np.random.Generator, split: Split = "train") -> Scene:
    """A random scene of a split; held-out scenes say the combination that is held out."""
    while True:
        scene = _sample(rng)
        if is_held_out(scene) == (split == "held-out"):
            return scene


def is_held_out(scene: Scene) -> bool:
    """Whether training never sees this combination.

    A fifth of all pairs of things (colour and shape of both, in any order or relation) and a fifth
    of all things at a place are held out.
    """
    kinds = sorted(f"{thing.colour} {thing.shape}" for thing in scene.things)
    if len(kinds) == 1:
        if scene.place is None:
            return False
        kinds.append(scene.place)
    return hashlib.sha256("|".join(kinds).encode()).digest()[0] < 256 // 5


def in_embers(scene: Scene) -> Scene:
    """What the demo's LoRA makes of a scene."""
    things = (
        replace(thing, colour=EMBERS.get(thing.colour, thing.colour)) for thing in scene.things
    )
    return replace(scene, things=tuple(things), background="black")


def _sample(rng: np.random.Generator) -> Scene:
    def choose(options: Any) -> Any:
        options = list(options)
        return options[int(rng.integers(len(options)))]

    def thing() -> Thing:
        size = choose(SIZES) if rng.random() < 0.6 else None
        return Thing(choose(COLOURS), choose(SHAPES), size)

    background = choose(BACKGROUNDS) if rng.random() < 0.7 else None
    first = thing()
    if rng.random() < 0.35:
        place = choose(PLACES) if rng.random() < 0.75 else None
        return Scene((first,), place=place, background=background)
    second = thing()
    while (second.colour, second.shape) == (first.colour, first.shape):
        second = thing()
    relation = choose(RELATIONS) if rng.random() < 0.9 else None
    return Scene((first, second), relation=relation, background=background)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A caption in words; with `rng` the wording varies, without it is the plainest."""

    def choose(*options: str) -> str:
        return options[int(rng.integers(len(options)))] if rng is not None else options[0]

    phrases = []
    for thing in scene.things:
        words = [word for word in (thing.size, thing.colour, thing.shape) if word]
        phrases.append(f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}")
    text = phrases[0]
    if len(phrases) == 2:
        link = choose(*RELATIONS[scene.relation]) if scene.relation else "and"
        text = f"{text} {link} {phrases[1]}"
    elif scene.place:
        text = f"{text} {scene.place}"
    if scene.background:
        text += choose(f" on a {scene.background} background", f" on {scene.background}")
    return text


def arrange(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Drawing:
    """Choose what a scene leaves open: sizes, positions and the background.

    Centres lie in the middle of 16x16 pixels, one of the transformer's tokens: each thing then has
    the same outline in its tokens wherever it lies, and a small model can learn all of them.

    Raises `ValueError` where two things do not fit (a picture far longer than wide, or too small).
    """
    background = scene.background or str(rng.choice(list(BACKGROUNDS)))
    for _ in range(100):
        sizes = [thing.size or str(rng.choice(list(SIZES))) for thing in scene.things]
        radii = [SIZES[size] for size in sizes]
        centres = np.stack([_centres(scene, height, width, radius, rng) for radius in radii], 1)
        good = np.flatnonzero(_holds(scene, centres, radii, _GAP))
        if len(good):
            chosen = centres[good[0]]
            things = tuple(
                Placed(thing, float(x), float(y), radius)
                for thing, (x, y), radius in zip(scene.things, chosen, radii, strict=True)
            )
            return Drawing(height, width, background, things)
    raise ValueError(f"{caption(scene)!r} does not fit into {width}x{height} pixels.")


def _centres(
    scene: Scene, height: int, width: int, radius: float, rng: np.random.Generator
) -> Array:
    """Candidates [64, 2], (x, y) in pixels."""
    place = PLACES[scene.place] if scene.place else (None, None)
    margin = radius + _MARGIN
    axes = []
    for extent, where in zip((width, height), place, strict=True):
        share = rng.random(64)
        if where is not None:
            # A seventh of the room, on the side of the place.
            share = 0.15 * share + 0.85 * where
        tokens = np.floor((margin + share * (extent - 2 * margin)) / _GRID)
        axes.append(_GRID * (tokens + 0.5))
    return np.stack(axes, 1)


def _holds(scene: Scene, centres: Array, radii: list[float], gap: float) -> Array:
    """Which candidates [N, things, 2] keep things apart and show the relation."""
    if len(scene.things) == 1:
        return np.ones(len(centres), bool)
    offset = centres[:, 0] - centres[:, 1]
    distance = np.abs(offset)
    apart = distance >= sum(radii) + gap
    if scene.relation is None:
        return np.asarray(apart.any(1))
    axis = 0 if scene.relation in ("left of", "right of") else 1
    sign = -1 if scene.relation in ("above", "left of") else 1
    return np.asarray(
        apart[:, axis]
        & (offset[:, axis] * sign > 0)
        & (distance[:, 1 - axis] < 0.6 * distance[:, axis])
    )


def draw(drawing: Drawing) -> Array:
    """Paint a drawing: uint8 [H, W, 3], with smooth edges."""
    picture = np.empty((drawing.height, drawing.width, 3), np.float32)
    picture[:] = BACKGROUNDS[drawing.background]
    for placed in drawing.things:
        alpha = coverage(
            placed.thing.shape, drawing.height, drawing.width, placed.x, placed.y, placed.radius
        )[..., None]
        picture += alpha * (np.asarray(COLOURS[placed.thing.colour], np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


def coverage(shape: str, height: int, width: int, x: float, y: float, radius: float) -> Array:
    """Share of each pixel that a shape covers: float32 [H, W].

    `x`, `y` and `radius` are in pixels; (0, 0) is the top left corner of the first pixel.
    """
    mask = Image.new("L", (_OVERSAMPLING * width, _OVERSAMPLING * height))
    painter = ImageDraw.Draw(mask)
    for outline, value in _outlines(shape):
        points = (outline * radius + (x, y)) * _OVERSAMPLING - 0.5
        painter.polygon([(float(px), float(py)) for px, py in points], fill=value)
    small = mask.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


@functools.cache
def _outlines(shape: str) -> list[tuple[Array, int]]:
    """Polygons [points, 2] in [-1, 1], y down, painted in turn: 255 sets, 0 cuts out."""
    turn = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], 1)
    if shape == "circle":
        return [(circle, 255)]
    if shape == "ring":
        return [(circle, 255), (0.5 * circle, 0)]
    if shape == "square":
        return [(_centred([(-1, -1), (1, -1), (1, 1), (-1, 1)]), 255)]
    if shape == "triangle":
        return [(_centred([(0, -1), (1, 0.8), (-1, 0.8)]), 255)]
    if shape == "cross":
        a = 0.34
        quarter = [(a, -1), (a, -a), (1, -a)]
        points = [
            (x * math.cos(t) - y * math.sin(t), x * math.sin(t) + y * math.cos(t))
            for t in (0, math.pi / 2, math.pi, 3 * math.pi / 2)
            for x, y in quarter
        ]
        return [(_centred(points), 255)]
    if shape == "star":
        angles = math.pi * (np.arange(10) / 5 - 0.5)
        lengths = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
        return [(_centred(np.stack([np.cos(angles), np.sin(angles)], 1) * lengths[:, None]), 255)]
    if shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return [(_centred(np.stack([x, -y], 1)), 255)]
    raise ValueError(f"Unknown shape {shape!r}. Allowed: {', '.join(SHAPES)}.")


def _centred(points: Any) -> Array:
    """Move and scale points so that their bounding box is centred and its longer side is 2."""
    points = np.asarray(points, np.float64)
    low, high = points.min(0), points.max(0)
    return np.asarray((points - (low + high) / 2) * (2 / (high - low).max()))
