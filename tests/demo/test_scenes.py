"""The captioned scenes: what is held out, what captions say, and what pictures show."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest

from fluxdeploy.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    arrange,
    caption,
    coverage,
    draw,
    is_held_out,
    sample_scene,
)

EXTENTS = range(96, 161, 16)

AREAS = {
    "circle": math.pi,
    "square": 4.0,
    "ring": 0.75 * math.pi,
    "triangle": 1.8,
    "cross": 8 * 0.34 - 4 * 0.34**2,
    # Ten triangles around the centre; the points are as far apart as the box is wide.
    "star": 5 * 0.45 * math.sin(math.pi / 5) / math.sin(2 * math.pi / 5) ** 2,
    # The curve has an area of 180 pi and a width of 32.
    "heart": 180 * math.pi / 16**2,
}
"""Areas of shapes with radius 1."""


def combination(scene: Scene) -> frozenset[tuple[str, str] | str | None]:
    """What makes a held-out scene: the kinds of its things, and the place of a single one."""
    kinds = {(thing.colour, thing.shape) for thing in scene.things}
    return frozenset(kinds | {scene.place} if len(kinds) == 1 else kinds)


def test_training_never_sees_a_held_out_combination() -> None:
    rng = np.random.default_rng(0)
    train = {combination(sample_scene(rng, "train")) for _ in range(2000)}
    held_out = {combination(sample_scene(rng, "held-out")) for _ in range(2000)}
    assert not train & held_out
    assert len(held_out) > 300


def test_order_relation_sizes_and_background_do_not_let_a_combination_into_training() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = sample_scene(rng, "held-out")
        things = tuple(Thing(t.colour, t.shape, "small") for t in reversed(scene.things))
        relation = "left of" if len(things) == 2 else None
        assert is_held_out(Scene(things, relation, scene.place, "gray"))


def test_a_fifth_of_pairs_and_of_places_is_held_out() -> None:
    kinds = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [Scene((a, b)) for n, a in enumerate(kinds) for b in kinds[:n]]
    places = [Scene((kind,), place=place) for kind in kinds for place in PLACES]
    for scenes in (pairs, places):
        assert np.mean([is_held_out(scene) for scene in scenes]) == pytest.approx(0.2, abs=0.05)
    assert not any(is_held_out(Scene((kind,))) for kind in kinds)


def test_captions_say_what_the_scene_says_and_no_more() -> None:
    rng = np.random.default_rng(2)
    for _ in range(500):
        scene = sample_scene(rng)
        text = caption(scene, rng)
        first, *rest = [
            " ".join(word for word in (thing.size, thing.colour, thing.shape) if word)
            for thing in scene.things
        ]
        assert text.split(maxsplit=1)[1].startswith(first)
        assert all(f" {words}" in text.partition(first)[2] for words in rest)
        # Words of places and backgrounds stand at the end, and "on" only there.
        if scene.background:
            assert text.endswith((f"on a {scene.background} background", f"on {scene.background}"))
        else:
            assert not any(name in text for name in BACKGROUNDS)
        assert [place for place in PLACES if place in text] == [scene.place] * bool(scene.place)
        said = {name for name, words in RELATIONS.items() if any(f" {w} " in text for w in words)}
        assert said == ({scene.relation} if scene.relation else set())
        named = [thing.size for thing in scene.things if thing.size]
        assert [word for word in text.split() if word in SIZES] == named


def test_captions_are_short_and_repeatable() -> None:
    rng = np.random.default_rng(3)
    for seed in range(500):
        scene = sample_scene(rng)
        texts = [caption(scene, np.random.default_rng(seed)) for _ in range(2)]
        assert texts[0] == texts[1]
        assert len(texts[0].split()) <= 20
        assert caption(scene) == caption(scene)


def test_scenes_and_drawings_repeat_from_a_seed() -> None:
    drawings = []
    for _ in range(2):
        rng = np.random.default_rng(4)
        drawings.append([arrange(sample_scene(rng), 96, 128, rng) for _ in range(20)])
    assert drawings[0] == drawings[1]


def test_every_word_of_the_vocabulary_is_used() -> None:
    rng = np.random.default_rng(5)
    text = " | ".join(caption(sample_scene(rng), rng) for _ in range(2000))
    phrases = [*COLOURS, *BACKGROUNDS, *SHAPES, *SIZES, *PLACES, "and"]
    phrases += [words for several in RELATIONS.values() for words in several]
    assert [words for words in phrases if f" {words}" not in text] == []
    allowed = {word for words in phrases for word in words.split()}
    assert set(text.replace("|", "").split()) == allowed | {"a", "an", "on", "background"}


@pytest.mark.parametrize(("height", "width"), list(product(EXTENTS, EXTENTS)))
def test_drawings_keep_margins_gaps_sizes_and_relations(height: int, width: int) -> None:
    rng = np.random.default_rng(height * 1000 + width)
    for _ in range(12):
        scene = sample_scene(rng)
        drawing = arrange(scene, height, width, rng)
        assert drawing.background == scene.background or scene.background is None
        for thing, placed in zip(scene.things, drawing.things, strict=True):
            allowed = [SIZES[thing.size]] if thing.size else list(SIZES.values())
            assert placed.radius in allowed
            assert placed.x % 16 == placed.y % 16 == 8
            margin = placed.radius + 3
            assert margin <= placed.x <= width - margin
            assert margin <= placed.y <= height - margin
        if len(drawing.things) == 2:
            a, b = drawing.things
            across, down = a.x - b.x, a.y - b.y
            assert max(abs(across), abs(down)) >= a.radius + b.radius + 4
            signs = {
                "left of": -across - abs(down),
                "right of": across - abs(down),
                "above": -down - abs(across),
                "below": down - abs(across),
            }
            assert scene.relation is None or signs[scene.relation] > 0


@pytest.mark.parametrize("place", PLACES)
def test_single_things_lie_at_their_place(place: str) -> None:
    rng = np.random.default_rng(6)
    for height, width in pairwise([96, 160, 96, 128]):
        placed = arrange(Scene((Thing("red", "star"),), place=place), height, width, rng).things[0]
        axes = ((width, placed.x), (height, placed.y))
        for (extent, value), where in zip(axes, PLACES[place], strict=True):
            margin = placed.radius + 3
            share = (value - margin) / (extent - 2 * margin)
            step = 8 / (extent - 2 * margin)
            assert where is None or abs(share - where) <= 0.15 + step


def test_what_does_not_fit_is_refused() -> None:
    scene = Scene((Thing("red", "star"), Thing("blue", "ring")), relation="above")
    with pytest.raises(ValueError, match=r"a red star above a blue ring.*1000000000x96"):
        arrange(scene, 96, 10**9, np.random.default_rng(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [12.3, 33.7])
def test_shapes_have_their_size_position_and_area(shape: str, radius: float) -> None:
    alpha = coverage(shape, 90, 110, 60.2, 41.4, radius)
    assert alpha.dtype == np.float32
    assert alpha.shape == (90, 110)
    rows, columns = np.nonzero(alpha > 0.5)
    # Points thinner than a pixel cover less than half of it.
    slack = 2 if shape in ("star", "triangle", "heart") else 1
    spans = [(columns.min(), columns.max() + 1, 60.2), (rows.min(), rows.max() + 1, 41.4)]
    assert max(high - low for low, high, _ in spans) == pytest.approx(2 * radius, abs=2 * slack)
    for low, high, middle in spans:
        assert (low + high) / 2 == pytest.approx(middle, abs=slack)
    expected = AREAS[shape] * radius**2
    assert float(alpha.sum()) == pytest.approx(expected, rel=0.5 / radius)


def test_shapes_stand_upright() -> None:
    for shape, heavy_end in (("triangle", "bottom"), ("heart", "top"), ("star", "bottom")):
        alpha = coverage(shape, 64, 64, 32, 32, 25)
        top, bottom = alpha[:32].sum(), alpha[32:].sum()
        assert (top > bottom) == (heavy_end == "top")
    assert coverage("ring", 64, 64, 32, 32, 25)[32, 32] == 0


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown shape 'oval'.*circle, square"):
        coverage("oval", 8, 8, 4, 4, 2)


def test_pictures_have_the_colours_of_the_scene() -> None:
    rng = np.random.default_rng(7)
    for _ in range(30):
        drawing = arrange(sample_scene(rng), 112, 144, rng)
        picture = draw(drawing)
        assert picture.shape == (112, 144, 3)
        assert picture.dtype == np.uint8
        covered = np.zeros((112, 144), bool)
        for placed in drawing.things:
            alpha = coverage(placed.thing.shape, 112, 144, placed.x, placed.y, placed.radius)
            assert (picture[alpha == 1] == COLOURS[placed.thing.colour]).all()
            covered |= alpha > 0
        assert (picture[~covered] == BACKGROUNDS[drawing.background]).all()
