"""The scorer is right on drawn truth, also where it is degraded, and refuses what is wrong."""

from __future__ import annotations

import io
from collections import Counter, deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from fluxdeploy.demo import scorer
from fluxdeploy.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    Drawing,
    Placed,
    Scene,
    Thing,
    arrange,
    draw,
    sample_scene,
)
from fluxdeploy.demo.scorer import Score, look, score

Array = np.ndarray[Any, np.dtype[Any]]

EXTENTS = [(96, 96), (96, 160), (160, 96), (128, 128), (160, 160)]


def degrade(picture: Array, rng: np.random.Generator) -> Array:
    """A picture blurred, with noise, and compressed: worse than what a model draws."""
    blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1))
    noisy = np.asarray(blurred, np.float32) + rng.normal(0, 8, picture.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file).convert("RGB"))


def measures(result: Score) -> dict[str, bool | None]:
    return {
        "objects": result.objects,
        "things": all(result.things),
        "relation": result.relation,
        "place": result.place,
        "background": result.background,
        "sizes": result.sizes,
    }


def right_shares(height: int, width: int, count: int, degraded: bool) -> dict[str, float]:
    rng = np.random.default_rng(height + 7 * width)
    right, asked = Counter[str](), Counter[str]()
    for number in range(count):
        scene = sample_scene(rng, "train" if number % 2 else "held-out")
        picture = draw(arrange(scene, height, width, rng))
        picture = degrade(picture, rng) if degraded else picture
        for name, value in measures(score(picture, scene)).items():
            if value is not None:
                asked[name] += 1
                right[name] += value
    return {name: right[name] / asked[name] for name in asked}


@pytest.mark.parametrize(("height", "width"), EXTENTS)
def test_drawn_truth_is_right(height: int, width: int) -> None:
    shares = right_shares(height, width, 120, degraded=False)
    assert len(shares) == 6
    assert min(shares.values()) >= 0.99, shares


@pytest.mark.parametrize(("height", "width"), EXTENTS)
def test_degraded_truth_is_right(height: int, width: int) -> None:
    shares = right_shares(height, width, 60, degraded=True)
    assert len(shares) == 6
    assert min(shares.values()) >= 0.97, shares


def test_large_pictures_are_read_too() -> None:
    shares = right_shares(512, 384, 6, degraded=False)
    assert min(shares.values()) == 1, shares


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [14.0, 26.5])
def test_position_and_radius_are_measured(shape: str, radius: float) -> None:
    placed = Placed(Thing("blue", shape), 50.3, 70.8, radius)
    rng = np.random.default_rng(0)
    for picture in (painted(placed), degrade(painted(placed), rng)):
        (seen,) = look(picture).things
        assert (seen.colour, seen.shape) == ("blue", shape)
        assert seen.radius == pytest.approx(radius, rel=0.06)
        assert seen.x == pytest.approx(50.3, abs=0.7)
        left, top, right, bottom = seen.box
        assert (left + right) / 2 == pytest.approx(50.3, abs=2)
        assert (top + bottom) / 2 == pytest.approx(70.8, abs=2.5)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_colours_may_be_a_little_off(colour: str, background: str) -> None:
    rng = np.random.default_rng(1)
    scene = Scene((Thing(colour, "star"),), background=background)
    for _ in range(3):
        picture = draw(arrange(scene, 128, 128, rng)) + rng.uniform(-15, 15, 3)
        result = score(degrade(np.clip(picture, 0, 255).astype(np.uint8), rng), scene)
        assert result.objects
        assert result.background


def painted(*things: Placed, background: str = "white") -> Array:
    return draw(Drawing(128, 128, background, things))


CIRCLE = Placed(Thing("red", "circle", "large"), 34, 36, 21)
STAR = Placed(Thing("blue", "star", "small"), 92, 88, 14)
SCENE = Scene((CIRCLE.thing, STAR.thing), relation="above", background="white")


def moved(placed: Placed, x: float, y: float) -> Placed:
    return replace(placed, x=x, y=y)


UPPER, LOWER = moved(CIRCLE, 60, 34), moved(STAR, 66, 96)


def test_a_right_picture_is_right_in_everything() -> None:
    expected = Score(True, (True, True), True, None, True, True)
    assert score(painted(UPPER, LOWER), SCENE) == expected


@pytest.mark.parametrize("colour", [colour for colour in COLOURS if colour != "blue"])
def test_a_wrong_colour_is_refused(colour: str) -> None:
    wrong = replace(LOWER, thing=replace(LOWER.thing, colour=colour))
    expected = Score(False, (True, False), False, None, True, False)
    assert score(painted(UPPER, wrong), SCENE) == expected


@pytest.mark.parametrize("drawn", SHAPES)
@pytest.mark.parametrize("radius", [16.5, 27.0])
def test_each_shape_is_taken_for_no_other(drawn: str, radius: float) -> None:
    truth = painted(Placed(Thing("green", drawn), 60, 64, radius), background="beige")
    for picture in (truth, degrade(truth, np.random.default_rng(2))):
        right = [s for s in SHAPES if score(picture, Scene((Thing("green", s),))).objects]
        assert right == [drawn]


def test_the_other_relation_is_refused() -> None:
    picture = painted(moved(CIRCLE, 66, 90), moved(STAR, 60, 26))
    assert score(picture, SCENE).relation is False
    assert score(picture, SCENE).objects
    assert score(picture, replace(SCENE, relation="below")).relation is True
    assert score(picture, replace(SCENE, relation="left of")).relation is False
    assert score(picture, replace(SCENE, relation=None)).relation is None


def test_a_missing_thing_is_refused() -> None:
    expected = Score(False, (True, False), False, None, True, False)
    assert score(painted(UPPER), SCENE) == expected


@pytest.mark.parametrize("thing", [Thing("green", "ring"), Thing("red", "circle")])
def test_a_thing_too_many_is_refused(thing: Thing) -> None:
    result = score(painted(UPPER, LOWER, Placed(thing, 22, 108, 14)), SCENE)
    assert not result.objects
    assert result.things == (True, True)
    # With two red circles nobody can say which one is meant.
    assert result.relation is (thing != Thing("red", "circle"))


def test_a_shape_of_no_known_kind_is_a_thing_too_many() -> None:
    image = Image.fromarray(painted(UPPER, LOWER))
    ImageDraw.Draw(image).polygon([(8, 100), (40, 104), (14, 108), (20, 120)], fill=(0, 255, 0))
    result = score(np.asarray(image), SCENE)
    assert not result.objects
    assert result.relation


@pytest.mark.parametrize(
    "outline",
    [
        [(20, 50), (100, 50), (100, 75), (20, 75)],
        [(30, 30), (45, 30), (45, 85), (100, 85), (100, 100), (30, 100)],
        [(30, 40), (90, 40), (90, 50), (68, 50), (68, 100), (52, 100), (52, 50), (30, 50)],
        [(20, 64), (64, 44), (108, 64), (64, 84)],
        [(30, 30), (98, 98), (98, 30), (30, 98)],
    ],
    ids=["bar", "corner", "T", "flat diamond", "hourglass"],
)
def test_other_shapes_have_no_name(outline: list[tuple[int, int]]) -> None:
    image = Image.fromarray(painted())
    ImageDraw.Draw(image).polygon(outline, fill=COLOURS["purple"])
    (seen,) = look(np.asarray(image)).things
    assert (seen.colour, seen.shape) == ("purple", None)


def test_a_speck_is_no_thing() -> None:
    image = Image.fromarray(painted(UPPER, LOWER))
    ImageDraw.Draw(image).rectangle((10, 110, 13, 113), fill=COLOURS["green"])
    assert score(np.asarray(image), SCENE).objects


def test_another_background_is_refused() -> None:
    for background in BACKGROUNDS:
        result = score(painted(UPPER, LOWER, background=background), SCENE)
        assert result.background is (background == "white")
        assert result.objects


def test_the_other_size_is_refused() -> None:
    swapped = (replace(UPPER, radius=14), replace(LOWER, radius=21))
    assert score(painted(*swapped), SCENE).sizes is False
    assert score(painted(replace(UPPER, radius=14), LOWER), SCENE).sizes is False
    unsized = replace(SCENE, things=(Thing("red", "circle"), Thing("blue", "star")))
    assert score(painted(*swapped), unsized).sizes is None


def test_another_place_is_refused() -> None:
    scene = Scene((STAR.thing,), place="in the top left corner")
    places = {
        (24, 24): ["at the top", "on the left", "in the top left corner"],
        (64, 64): ["in the center"],
        (104, 66): ["on the right"],
        (64, 104): ["at the bottom"],
    }
    for (x, y), expected in places.items():
        picture = painted(moved(STAR, x, y))
        right = [p for p in PLACES if score(picture, replace(scene, place=p)).place]
        assert sorted(right) == sorted(expected)


def test_pictures_of_nothing_are_refused() -> None:
    rng = np.random.default_rng(3)
    ramp = np.linspace(0, 255, 128)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    pictures = {
        "white": np.full((128, 128, 3), 245),
        "red": np.full((128, 128, 3), COLOURS["red"]),
        "fine noise": rng.integers(0, 256, (128, 128, 3)),
        "normal noise": np.clip(rng.normal(128, 60, (128, 128, 3)), 0, 255),
        "coarse noise": np.asarray(coarse.resize((128, 128), Image.Resampling.BICUBIC)),
        "ramp": np.broadcast_to(ramp[:, None, None], (128, 128, 3)),
    }
    for name, picture in pictures.items():
        result = score(picture.astype(np.uint8), SCENE)
        assert not result.objects, name
        assert not any(result.things), name
        assert result.relation is False


def test_noise_around_right_things_is_refused() -> None:
    picture = painted(UPPER, LOWER).copy()
    picture[100:, :50] = np.random.default_rng(4).integers(0, 256, (28, 50, 3))
    assert not score(picture, SCENE).objects


@pytest.mark.parametrize(
    "picture", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4))]
)
def test_arrays_that_are_no_pictures_are_refused(picture: Array) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], not"):
        look(picture)


def flood_fill(labels: Array) -> Array:
    """Connected pieces, one pixel after the other."""
    numbers = np.full(labels.shape, -1)
    count = 0
    for start in np.ndindex(*labels.shape):
        if numbers[start] >= 0:
            continue
        numbers[start] = count
        queue = deque([start])
        while queue:
            row, column = queue.popleft()
            for r, c in (
                (row + 1, column),
                (row - 1, column),
                (row, column + 1),
                (row, column - 1),
            ):
                inside = 0 <= r < labels.shape[0] and 0 <= c < labels.shape[1]
                if inside and numbers[r, c] < 0 and labels[r, c] == labels[start]:
                    numbers[r, c] = count
                    queue.append((r, c))
        count += 1
    return numbers


@pytest.mark.parametrize("colours", [1, 2, 3])
def test_pieces_equal_those_of_a_flood_fill(colours: int) -> None:
    rng = np.random.default_rng(colours)
    for height, width in ((1, 9), (9, 1), (17, 23), (40, 31)):
        labels = rng.integers(0, colours, (height, width))
        pieces, count = scorer._pieces(labels)
        expected = flood_fill(labels)
        pairs = set(zip(pieces.ravel().tolist(), expected.ravel().tolist(), strict=True))
        assert len(pairs) == count == expected.max() + 1
