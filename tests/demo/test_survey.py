"""A survey asks for every picture once, and its shares are those of the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fluxdeploy.demo.scenes import arrange, draw, is_held_out
from fluxdeploy.demo.scorer import Score
from fluxdeploy.demo.survey import PICTURE_SIZES, Question, ask, share, survey

Array = np.ndarray[Any, np.dtype[Any]]


class Painter:
    """Draws the truth for the first `right` questions and blank pictures for the others."""

    def __init__(self, questions: Sequence[Question], right: int) -> None:
        self.scenes = {question.prompt: question.scene for question in questions[:right]}
        self.calls: list[tuple[int, int, int, int]] = []

    def __call__(self, prompts: Sequence[str], height: int, width: int, seed: int) -> Array:
        self.calls.append((len(prompts), height, width, seed))
        return np.stack([self.paint(prompt, height, width) for prompt in prompts])

    def paint(self, prompt: str, height: int, width: int) -> Array:
        if prompt not in self.scenes:
            return np.ones((height, width, 3), np.float32)
        drawing = arrange(self.scenes[prompt], height, width, np.random.default_rng(0))
        return draw(drawing).astype(np.float32) / 255


def test_truth_is_right_in_everything() -> None:
    questions = ask(24)
    shares = survey(Painter(questions, 24), questions)
    assert shares.pictures == 24
    assert {*vars(shares).values()} == {24, 1.0}


def test_shares_are_those_of_the_right_pictures() -> None:
    questions = ask(24)
    shares = survey(Painter(questions, 15), questions)
    assert shares.objects == 15 / 24


def test_batches_have_one_size_and_a_seed_of_their_own() -> None:
    questions = ask(40)
    painter = Painter(questions, 40)
    heard: list[int] = []
    survey(painter, questions, batch=8, on_pictures=heard.append)
    assert sum(heard) == 40
    assert max(heard) <= 8
    assert [count for count, *_ in painter.calls] == heard
    assert len({seed for *_, seed in painter.calls}) == len(painter.calls)
    assert {call[1:3] for call in painter.calls} == set(PICTURE_SIZES)


def test_questions_are_held_out_and_the_first_of_more() -> None:
    questions = ask(60)
    assert all(is_held_out(question.scene) for question in questions)
    assert ask(20) == questions[:20]
    assert ask(20, seed=1) != questions[:20]
    sizes = [(question.height, question.width) for question in questions]
    assert sizes.count((128, 128)) == 30


def test_what_no_scene_says_has_no_share() -> None:
    shares = share([Score(True, (True, False), None, None, None, None)])
    assert shares.things == 0.5
    assert [shares.relation, shares.place, shares.background, shares.sizes] == [None] * 4


def test_no_scores_have_no_shares() -> None:
    with pytest.raises(ValueError, match="no scores"):
        share([])
