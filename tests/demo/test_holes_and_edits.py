"""Holes and changes by words, and who says whether they were filled and made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fluxdeploy.demo.edits import Edit, sample_edit
from fluxdeploy.demo.holes import Hole, sample_hole
from fluxdeploy.demo.matches import match_edit, match_fill
from fluxdeploy.demo.scenes import Drawing, Placed, Scene, Thing, coverage, draw, is_held_out

SIZE = (96, 128)
STAR = Placed(Thing("red", "star"), 24, 40, 21)
RING = Placed(Thing("blue", "ring"), 88, 56, 14)
SCENE = Drawing(*SIZE, "white", (STAR, RING))


def swapped(old: Placed, **changes: str) -> Drawing:
    new = replace(old, thing=replace(old.thing, **changes))
    return replace(SCENE, things=tuple(new if t is old else t for t in SCENE.things))


def scene_of(drawing: Drawing) -> Scene:
    return Scene(tuple(placed.thing for placed in drawing.things))


def test_a_hole_hides_its_thing_whole_and_says_what_belongs_there() -> None:
    rng = np.random.default_rng(0)
    holes = [sample_hole(rng, *SIZE) for _ in range(60)]
    for hole in holes:
        assert hole.mask.shape == SIZE
        if hole.thing is None:
            (left,) = hole.drawing.things
            assert left.thing.shape in hole.prompt
            continue
        thing = hole.thing
        covered = coverage(thing.thing.shape, *SIZE, thing.x, thing.y, thing.radius)
        assert not covered[~hole.mask].any()
        assert f"{thing.thing.colour} {thing.thing.shape}" in hole.prompt
    assert 0 < sum(hole.thing is None for hole in holes) < 20
    assert not any(is_held_out(scene_of(hole.drawing)) for hole in holes)


def test_a_held_out_hole_cuts_no_other_thing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        hole = sample_hole(rng, *SIZE, "held-out")
        for other in hole.drawing.things:
            covered = coverage(other.thing.shape, *SIZE, other.x, other.y, other.radius)
            assert other is hole.thing or not covered[hole.mask].any()


def test_an_edit_changes_what_its_words_name_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(80):
        edit = sample_edit(rng, *SIZE)
        words = edit.prompt.split()
        assert not is_held_out(scene_of(edit.before))
        assert not is_held_out(scene_of(edit.after))
        pairs = zip(edit.before.things, edit.after.things, strict=True)
        changed = [(old, new) for old, new in pairs if old != new]
        if edit.before.background != edit.after.background:
            assert (changed, words[-2:]) == ([], ["background", edit.after.background])
            kinds.add("background")
            continue
        ((old, new),) = changed
        assert (old.x, old.y, old.radius) == (new.x, new.y, new.radius)
        assert old.thing.shape in words
        named = old.thing.colour in words
        same = [p for p in edit.before.things if p.thing.shape == old.thing.shape]
        assert named or len(same) == 1
        assert (words[-1], old.thing.shape) == (new.thing.colour, new.thing.shape)
        kinds.add("thing")
    assert kinds == {"background", "thing"}


def test_the_same_numbers_draw_the_same_hole_and_edit() -> None:
    first, second = (np.random.default_rng(3) for _ in range(2))
    a, b = sample_hole(first, *SIZE), sample_hole(second, *SIZE)
    assert np.array_equal(a.mask, b.mask)
    assert (a.prompt, a.drawing) == (b.prompt, b.drawing)
    assert sample_edit(first, *SIZE) == sample_edit(second, *SIZE)


@pytest.mark.parametrize(
    ("shown", "changed", "kept"),
    [
        (swapped(STAR, colour="green"), True, True),
        (SCENE, False, True),
        (swapped(STAR, colour="pink"), False, True),
        (replace(SCENE, things=(replace(STAR, thing=Thing("green", "star")),)), True, False),
        (replace(swapped(STAR, colour="green"), background="beige"), True, False),
        (
            replace(
                SCENE,
                things=(replace(STAR, thing=Thing("green", "star")), replace(RING, x=RING.x + 16)),
            ),
            True,
            False,
        ),
        (
            replace(
                SCENE,
                things=(replace(STAR, thing=Thing("green", "star")), replace(RING, radius=21)),
            ),
            True,
            False,
        ),
    ],
    ids=["right", "unchanged", "another colour", "lost", "background", "moved", "grown"],
)
def test_an_edit_is_right_where_the_change_is_made_and_all_else_is_kept(
    shown: Drawing, changed: bool, kept: bool
) -> None:
    edit = Edit(SCENE, swapped(STAR, colour="green"), "make the star green")
    match = match_edit(draw(shown), edit)
    assert (match.changed, match.kept) == (changed, kept)
    assert match.right == (changed and kept)


def test_a_background_is_changed_or_not() -> None:
    edit = Edit(SCENE, replace(SCENE, background="black"), "make the background black")
    assert match_edit(draw(edit.after), edit).right
    assert not match_edit(draw(SCENE), edit).changed


def hole(thing: Placed | None = RING) -> Hole:
    mask = np.zeros(SIZE, bool)
    mask[32:80, 64:112] = True
    things = (STAR,) if thing is None else (STAR, thing)
    return Hole(replace(SCENE, things=things), mask, thing, "a blue ring")


@pytest.mark.parametrize(
    ("shown", "inside", "outside"),
    [
        (SCENE, True, True),
        (replace(SCENE, things=(STAR, replace(RING, x=84, y=52, radius=21))), True, True),
        (swapped(RING, colour="cyan"), False, True),
        (replace(SCENE, things=(STAR,)), False, True),
        (swapped(STAR, colour="green"), False, False),
        (replace(SCENE, background="black"), True, False),
    ],
    ids=["right", "elsewhere in it", "another colour", "nothing", "outside", "background"],
)
def test_a_hole_is_right_where_it_shows_the_thing_and_all_else_stays(
    shown: Drawing, inside: bool, outside: bool
) -> None:
    match = match_fill(draw(shown), hole())
    assert (match.inside, match.outside) == (inside, outside)
    assert match.right == (inside and outside)


def test_a_named_size_counts_in_a_hole() -> None:
    small = replace(RING, thing=replace(RING.thing, size="small"))
    things = (STAR, replace(small, radius=21))
    assert not match_fill(draw(replace(SCENE, things=things)), hole(small)).inside
    assert match_fill(draw(SCENE), hole(small)).right


def test_a_hole_for_nothing_is_background_alone() -> None:
    assert match_fill(draw(replace(SCENE, things=(STAR,))), hole(None)).right
    assert not match_fill(draw(SCENE), hole(None)).inside


def test_a_picture_that_drifts_outside_of_the_hole_is_not_right() -> None:
    darker = (draw(SCENE) * 0.93).astype(np.uint8)
    match = match_fill(darker, hole())
    assert match.inside
    assert match.change > 8
    assert not match.right
