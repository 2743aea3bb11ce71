"""How often pictures show what their prompts say, over many scenes that training never saw.

`survey` asks any callable for pictures, so that a bundle, a precision, a runtime and PyTorch are
all measured with the same prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluxdeploy.demo.scenes import Scene, caption, sample_scene
from fluxdeploy.demo.scorer import Score, score

__all__ = ["PICTURE_SIZES", "Draw", "Question", "Shares", "ask", "share", "survey"]

Array = np.ndarray[Any, np.dtype[Any]]

Draw = Callable[[Sequence[str], int, int, int], Array]
"""`draw(prompts, height, width, seed)`: a picture of each prompt, float32 [B, H, W, 3] in 0..1."""

PICTURE_SIZES = (
    (128, 128),
    (96, 160),
    (128, 128),
    (160, 96),
    (128, 128),
    (96, 96),
    (128, 128),
    (160, 160),
)
"""Heights and widths that questions take in turn: half of them have the default size."""


@dataclass(frozen=True)
class Question:
    """A scene, the words for it, and the size of the picture in pixels."""

    scene: Scene
    prompt: str
    height: int
    width: int


@dataclass(frozen=True)
class Shares:
    """The shares of pictures that are right, 0 to 1; None where no scene says anything of it.

    objects: all things of the prompt, and nothing else. things: of the single things.
    """

    pictures: int
    objects: float
    things: float
    relation: float | None
    place: float | None
    background: float | None
    sizes: float | None


def ask(count: int, seed: int = 0) -> tuple[Question, ...]:
    """Questions about held-out scenes in varied words; fewer are the first of more."""
    rng = np.random.default_rng(seed)
    questions = []
    for number in range(count):
        scene = sample_scene(rng, "held-out")
        height, width = PICTURE_SIZES[number % len(PICTURE_SIZES)]
        questions.append(Question(scene, caption(scene, rng), height, width))
    return tuple(questions)


def survey(
    draw: Draw,
    questions: Iterable[Question],
    batch: int = 8,
    on_pictures: Callable[[int], None] | None = None,
) -> Shares:
    """Draw the answers to all questions and score them.

    Questions of one size are drawn together, `batch` at most, each batch from a seed of its own:
    another `batch` means other pictures. `on_pictures` hears how many were scored.
    """
    sizes: dict[tuple[int, int], list[Question]] = {}
    for question in questions:
        sizes.setdefault((question.height, question.width), []).append(question)
    scores: list[Score] = []
    seed = 0
    for (height, width), group in sizes.items():
        for start in range(0, len(group), batch):
            some = group[start : start + batch]
            pictures = draw([question.prompt for question in some], height, width, seed)
            shown = np.rint(np.clip(pictures, 0, 1) * 255).astype(np.uint8)
            scores += [score(p, q.scene) for p, q in zip(shown, some, strict=True)]
            seed += 1
            if on_pictures is not None:
                on_pictures(len(some))
    return share(scores)


def share(scores: Sequence[Score]) -> Shares:
    """The shares of many scores.

    Raises `ValueError` where there are none.
    """
    if not scores:
        raise ValueError("There are no scores to take shares of.")
    return Shares(
        pictures=len(scores),
        objects=_mean(score.objects for score in scores) or 0.0,
        things=_mean(found for score in scores for found in score.things) or 0.0,
        relation=_mean(score.relation for score in scores),
        place=_mean(score.place for score in scores),
        background=_mean(score.background for score in scores),
        sizes=_mean(score.sizes for score in scores),
    )


def _mean(values: Iterable[bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
