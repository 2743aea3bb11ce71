"""`make demo` draws scenes that the demo models were trained for, in combinations that are new."""

from __future__ import annotations

import re

import pytest

from fluxdeploy.demo.scenes import PLACES, RELATIONS, Scene, Thing, caption, is_held_out
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
