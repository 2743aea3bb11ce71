"""`make demo` draws scenes that the demo models were trained for, in combinations that are new."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fluxdeploy import FluxPipeline
from fluxdeploy.demo.scenes import PLACES, RELATIONS, Scene, Thing, caption, is_held_out
from fluxdeploy.demo.scorer import score
from tests.docs.pages import ROOT

_THING = r"an? (?:(\w+) )?(\w+) (\w+)"
_LINKS = {words[0]: relation for relation, words in RELATIONS.items()}
_PROMPT = re.compile(
    rf"{_THING}(?: ({'|'.join(_LINKS)}) {_THING})?(?: ({'|'.join(PLACES)}))?"
    r"(?: on a (\w+) background)?"
)


def demo_prompts() -> list[str]:
    _, _, rest = (ROOT / "Makefile").read_text().partition("DEMO_PROMPTS := ")
    return re.findall(r'"(.*?)"', rest.partition("\n\n")[0])


def parse(prompt: str) -> Scene:
    match = _PROMPT.fullmatch(prompt)
    assert match, prompt
    size, colour, shape, link, size_2, colour_2, shape_2, place, background = match.groups()
    things = [Thing(colour, shape, size)]
    if link:
        things.append(Thing(colour_2, shape_2, size_2))
    return Scene(tuple(things), _LINKS[link] if link else None, place, background)


def test_there_are_eight_different_ones() -> None:
    assert len(set(demo_prompts())) == len(demo_prompts()) == 8


@pytest.mark.parametrize("prompt", demo_prompts())
def test_it_is_the_caption_of_a_held_out_scene(prompt: str) -> None:
    scene = parse(prompt)
    assert caption(scene) == prompt
    assert is_held_out(scene)


def test_the_pictures_are_right(demo_bundle: Path) -> None:
    """With the seed of `make demo`: things, places, relations, sizes and backgrounds."""
    seed = int(re.search(r"--seed (\d+)", (ROOT / "Makefile").read_text())[1])  # type: ignore[index]
    with FluxPipeline.from_bundle(demo_bundle) as pipe:
        for prompt in demo_prompts():
            found = score(np.asarray(pipe(prompt, seed=seed).images[0]), parse(prompt))
            assert found.objects, prompt
            judged = found.relation, found.place, found.background, found.sizes
            assert False not in judged, prompt
