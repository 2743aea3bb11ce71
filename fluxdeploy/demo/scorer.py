"""Says whether a picture shows what a scene says, by classical vision alone.

`look` finds the flat shapes of a picture: every pixel takes the nearest colour of the palette,
pieces of one colour that are more than an edge become things, and a thing has the shape whose
template covers it best. `score` compares what was found with a `Scene`. It knows nothing of how the
picture was made, so it measures every precision and runtime alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from fluxdeploy.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    coverage,
)

__all__ = ["Score", "Seen", "Sight", "look", "score"]

Array = np.ndarray[Any, np.dtype[Any]]

_PALETTE = {**COLOURS, **BACKGROUNDS}
_MAX_COLOUR_ERROR = 60.0
"""Farthest that a colour may be from its palette's: distance in sRGB. Two colours of things are 95
apart at least."""

_MIN_AREA = 57
"""Smallest thing, in pixels: a fifth of a small star."""

_MIN_INTERIOR = 0.15
"""Smallest share of a piece that does not touch its outline. Less is the band of a third colour
that a soft edge runs through, not a thing."""

_MAX_STRAY = 0.02
"""Largest share of the picture that may be neither background nor a thing."""

_MIN_OVERLAP = 0.8
"""Intersection over union that a shape needs with its template. A circle and a square, the most
alike, have 0.83 with each other."""

_MAX_STRETCH = 1.3
"""Largest factor between the aspect ratio of a thing and that of its shape."""

_GRID = 48
_REACH = 2.75
"""Shapes are compared on a grid of this many points a side, over this many standard deviations of
their pixels to each side of the centroid."""

_SOFTNESS = (0.0, 0.06, 0.12)
"""Blur of the templates, in radii: a blur of one pixel or two on the smallest shapes."""


@dataclass(frozen=True)
class Seen:
    """A thing found in a picture.

    colour: None where it is none of `COLOURS`. shape: None where no shape fits.
    x, y: centroid; box: left, top, right, bottom. In pixels, (0, 0) is the top left corner.
    radius: half the longer side of the shape's bounding box, in pixels. It comes from the spread of
    the pixels, since soft edges take the tips off and with them a part of `box`.
    overlap: intersection over union with the template that fits best.
    """

    colour: str | None
    shape: str | None
    x: float
    y: float
    radius: float
    box: tuple[int, int, int, int]
    overlap: float


@dataclass(frozen=True)
class Sight:
    """All that was found in a picture of `height` x `width` pixels.

    background: None where no colour of `BACKGROUNDS` holds most of the border.
    stray: the share of pixels that are neither background nor part of a thing.
    """

    height: int
    width: int
    background: str | None
    things: tuple[Seen, ...]
    stray: float


@dataclass(frozen=True)
class Score:
    """Whether a picture shows what a scene says; None where the scene leaves it open.

    things: for each of the scene's things, whether one of its colour and shape is there.
    objects: all of them are there, once each, and nothing else is.
    relation, place, sizes: False too where a thing is missing or there twice.
    """

    objects: bool
    things: tuple[bool, ...]
    relation: bool | None
    place: bool | None
    background: bool | None
    sizes: bool | None


def score(picture: Array, scene: Scene) -> Score:
    """Compare a picture, uint8 [H, W, 3], with what it should show.

    Raises `ValueError` for another type or shape of array.
    """
    sight = look(picture)
    matches = [
        [seen for seen in sight.things if (seen.colour, seen.shape) == (thing.colour, thing.shape)]
        for thing in scene.things
    ]
    found = [seen[0] for seen in matches if len(seen) == 1]
    complete = len(found) == len(matches)
    alone = len(sight.things) == len(scene.things) and sight.stray <= _MAX_STRAY
    sized = any(thing.size for thing in scene.things)
    return Score(
        objects=complete and alone,
        things=tuple(bool(seen) for seen in matches),
        relation=None if scene.relation is None else complete and _related(scene, found),
        place=None if scene.place is None else complete and _in_place(scene, found[0], sight),
        background=None if scene.background is None else sight.background == scene.background,
        sizes=None if not sized else complete and _sized(scene, found),
    )


def _related(scene: Scene, found: list[Seen]) -> bool:
    """Whether the longer of the two distances between the centroids is the relation's."""
    first, second = found
    across, down = first.x - second.x, first.y - second.y
    if abs(across) > abs(down):
        return scene.relation == ("left of" if across < 0 else "right of")
    return scene.relation == ("above" if down < 0 else "below")


def _in_place(scene: Scene, seen: Seen, sight: Sight) -> bool:
    """Whether the centre of a thing is in the place's third of the room that the thing has."""
    assert scene.place is not None
    left, top, right, bottom = seen.box
    spans = ((left, right, sight.width), (top, bottom, sight.height))
    for (low, high, extent), where in zip(spans, PLACES[scene.place], strict=True):
        share = low / max(extent - (high - low), 1)
        if where is not None and abs(share - where) > (1 / 6 if where == 0.5 else 1 / 3):
            return False
    return True


def _sized(scene: Scene, found: list[Seen]) -> bool:
    """Whether things are nearer to the size that they should have than to the other one."""
    middle = (SIZES["small"] + SIZES["large"]) / 2
    return all(
        thing.size is None or thing.size == ("small" if seen.radius < middle else "large")
        for thing, seen in zip(scene.things, found, strict=True)
    )


def look(picture: Array) -> Sight:
    """Find the background and the things of a picture, uint8 [H, W, 3].

    Raises `ValueError` for another type or shape of array.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(
            f"A picture is uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}."
        )
    height, width = picture.shape[:2]
    # A median takes noise away and leaves edges where they are.
    smooth = np.asarray(Image.fromarray(picture).filter(ImageFilter.MedianFilter(3)), np.float32)
    ground, name = _find_background(smooth)
    labels = _nearest(smooth, [ground, *(c for n, c in _PALETTE.items() if n != name)])
    owners, count = _separate(labels)
    pixels = picture.astype(np.float32)
    things = tuple(_describe(pixels, ground, owners, owner) for owner in range(1, count + 1))
    stray = float(np.mean((labels > 0) & (owners == 0)))
    background = name if name in BACKGROUNDS else None
    return Sight(height, width, background, things, stray)


def _find_background(smooth: Array) -> tuple[Array, str | None]:
    """The colour of most of the border, float32 [3], and its name in the palette, if it has one."""
    border = np.concatenate([smooth[0], smooth[-1], smooth[1:-1, 0], smooth[1:-1, -1]])
    labels = _nearest(border, list(_PALETTE.values()))
    ground = np.median(border[labels == np.bincount(labels).argmax()], 0)
    return np.asarray(ground), _name(ground)


def _name(colour: Array) -> str | None:
    distance = np.linalg.norm(np.array(list(_PALETTE.values())) - colour, axis=1)
    nearest = int(distance.argmin())
    return list(_PALETTE)[nearest] if distance[nearest] <= _MAX_COLOUR_ERROR else None


def _nearest(pixels: Array, colours: Sequence[Any]) -> Array:
    """The index of the colour that is nearest to each pixel [..., 3]: int64 [...]."""
    palette = np.array(colours, np.float32)
    return np.asarray(((palette**2).sum(1) - 2 * pixels @ palette.T).argmin(-1))


def _separate(labels: Array) -> tuple[Array, int]:
    """The things of an image of colours [H, W], 0 the background.

    Gives an image of the same size with 1, 2, ... where the things are and 0 elsewhere, and how
    many there are.
    """
    pieces, count = _pieces(labels)
    area = np.bincount(pieces.ravel(), minlength=count)
    inner = np.bincount(pieces[_interior(labels)], minlength=count)
    keep = (area >= _MIN_AREA) & (inner >= _MIN_INTERIOR * area)
    kept = np.where(keep[pieces], labels, 0)
    # Soft edges belong to the thing that they surround, whatever colour they pass through.
    for _ in range(min(labels.shape) // 16):
        kept = np.where((kept == 0) & (labels > 0), _spill(kept), kept)
    pieces, count = _pieces(kept)
    things = np.unique(pieces[kept > 0])
    numbers = np.zeros(count, np.int64)
    numbers[things] = np.arange(1, len(things) + 1)
    return numbers[pieces], len(things)


def _interior(labels: Array) -> Array:
    """Which pixels have no neighbour of another label, of eight or fewer at the border."""
    same = np.ones(labels.shape, bool)
    padded = np.pad(labels, 1, mode="edge")
    height, width = labels.shape
    for down in range(3):
        for across in range(3):
            same &= padded[down : down + height, across : across + width] == labels
    return same


def _spill(image: Array) -> Array:
    """The largest value of each pixel [H, W] and its four neighbours."""
    padded = np.pad(image, 1)
    around = [padded[1:-1, 2:], padded[1:-1, :-2], padded[2:, 1:-1], padded[:-2, 1:-1]]
    return np.asarray(np.maximum(image, np.maximum.reduce(around)))


def _pieces(labels: Array) -> tuple[Array, int]:
    """Connected pieces of equal label, side by side and not corner to corner.

    Gives a number from 0 for each pixel, and how many there are. Runs of a row are joined with
    those of the next by union and find, all at once.
    """
    starts = np.ones(labels.shape, bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    runs = np.cumsum(starts).reshape(labels.shape) - 1
    touching = labels[1:] == labels[:-1]
    upper, lower = runs[:-1][touching], runs[1:][touching]
    root = np.arange(runs[-1, -1] + 1)
    while True:
        a, b = root[upper], root[lower]
        apart = a != b
        if not apart.any():
            break
        upper, lower, a, b = upper[apart], lower[apart], a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root[root], root):
            root = root[root]
    _, numbers = np.unique(root, return_inverse=True)
    return numbers[runs], int(numbers.max()) + 1


def _describe(pixels: Array, ground: Array, owners: Array, owner: int) -> Seen:
    """Colour, shape and place of thing number `owner` of `owners`, soft edges included."""
    owned = owners == owner
    inside = owned & _interior(owned)
    colour = np.median(pixels[inside if inside.any() else owned], 0)
    # A pixel of an edge mixes the two colours: more than half of the thing's is inside.
    contrast = colour - ground
    # Thin tips, which the median took, are there again in the picture itself.
    near = _spill(_spill(owned)) & (owned | (owners == 0))
    alpha = np.where(near, (pixels - ground) @ contrast / max(contrast @ contrast, 1.0), 0.0)
    mask = alpha > 0.5
    if not mask.any():
        mask = owned
    rows, columns = np.nonzero(mask)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    name = _name(colour)
    spread = _spread(mask)
    template, overlap = _fit(alpha, spread)
    fits = overlap >= _MIN_OVERLAP
    return Seen(
        colour=name if name in COLOURS else None,
        shape=template.shape if fits else None,
        x=spread.x,
        y=spread.y,
        radius=template.radius(spread) if fits else max(box[2] - box[0], box[3] - box[1]) / 2,
        box=(int(box[0]), int(box[1]), int(box[2]), int(box[3])),
        overlap=overlap,
    )


@dataclass(frozen=True)
class _Spread:
    """Centroid and standard deviations of a mask's pixels. Soft edges hardly change them."""

    x: float
    y: float
    across: float
    down: float

    def sample(self, image: Array) -> Array:
        """An image [H, W], 0 to 1, where it lies `_REACH` deviations around: bool [points]."""
        x, y = _REACH * self.across, _REACH * self.down
        pad = int(max(x, y)) + 1
        padded = Image.fromarray(np.pad(np.clip(image, 0, 1) * 255, pad).astype(np.uint8))
        window = (self.x - x + pad, self.y - y + pad, self.x + x + pad, self.y + y + pad)
        sampled = padded.resize((_GRID, _GRID), Image.Resampling.BILINEAR, window)
        return np.asarray(sampled).ravel() > 127


def _spread(mask: Array) -> _Spread:
    rows, columns = np.nonzero(mask)
    # A pixel on its own has the deviation of a square.
    across, down = (math.sqrt(float(np.var(axis)) + 1 / 12) for axis in (columns, rows))
    return _Spread(float(columns.mean()) + 0.5, float(rows.mean()) + 0.5, across, down)


@dataclass(frozen=True)
class _Template:
    """A shape of radius 1, in deviations, and its mask [points]."""

    shape: str
    spread: _Spread
    mask: Array

    def radius(self, seen: _Spread) -> float:
        """The radius at which this shape has the size of what was seen."""
        return math.sqrt(seen.across * seen.down / (self.spread.across * self.spread.down))

    def overlap(self, mask: Array, seen: _Spread) -> float:
        """Intersection over union; 0 where one is stretched against the other."""
        stretch = seen.across / seen.down * self.spread.down / self.spread.across
        if not 1 / _MAX_STRETCH <= stretch <= _MAX_STRETCH:
            return 0.0
        return float(np.count_nonzero(mask & self.mask) / np.count_nonzero(mask | self.mask))


def _fit(alpha: Array, spread: _Spread) -> tuple[_Template, float]:
    """The template that fits the thing in `alpha` best, and their intersection over union.

    alpha: [H, W], 1 inside and 0 outside. spread: that of its pixels.
    """
    mask = spread.sample(alpha)
    overlaps = [template.overlap(mask, spread) for template in _templates()]
    best = int(np.argmax(overlaps))
    return _templates()[best], overlaps[best]


@functools.cache
def _templates() -> list[_Template]:
    """All shapes, with sharp corners and with corners as blunt as a soft picture has them."""
    radius, middle = 80, 110
    templates = []
    for shape in SHAPES:
        for softness in _SOFTNESS:
            drawn = coverage(shape, 2 * middle, 2 * middle, middle, middle, radius)
            image = Image.fromarray((drawn * 255).astype(np.uint8))
            soft = image.filter(ImageFilter.GaussianBlur(softness * radius))
            blunt = np.asarray(soft, np.float32) / 255
            spread = _spread(blunt > 0.5)
            unit = _Spread(0, 0, spread.across / radius, spread.down / radius)
            templates.append(_Template(shape, unit, spread.sample(blunt)))
    return templates
