"""The text stage: the text encoders learn what a caption says before any picture is drawn.

FLUX.1's text tokens have no positions in the transformer, so that which colour belongs to which
shape, and which thing comes first, has to be in the states that T5 and CLIP hand over. Published
FLUX.1 models take encoders that were trained on text; these ones are trained on the scenes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.training.loop import Draw, Recipe
from exporters.training.networks import TextEncoders
from fluxdeploy.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    sample_scene,
)

__all__ = ["RECIPE", "CaptionReader", "TextStage", "drop_captions", "facts"]

Array = np.ndarray[Any, np.dtype[Any]]

RECIPE = Recipe("text", steps=800, rate=4e-3, matrix_rate=4e-3, warmup=50, ema=0.99)

_DROPPED = 0.1

_THING = [1 + len(COLOURS), 1 + len(SHAPES), 1 + len(SIZES)]
_KINDS = [*_THING * 4, 1 + len(RELATIONS), 1 + len(PLACES), 1 + len(BACKGROUNDS)]


def facts(scene: Scene) -> Array:
    """What a caption says: uint8 [15], 0 for what it leaves open.

    Colour, shape and size of both things in the order of the caption; the same in the order of the
    picture (what lies above or on the left comes first, if the caption says so); the relation, the
    place and the background.
    """
    found = np.zeros(len(_KINDS), np.uint8)
    shown = scene.things[::-1] if scene.relation in ("below", "right of") else scene.things
    for start, things in ((0, scene.things), (6, shown)):
        for index, thing in enumerate(things):
            first = start + 3 * index
            found[first] = 1 + list(COLOURS).index(thing.colour)
            found[first + 1] = 1 + SHAPES.index(thing.shape)
            found[first + 2] = _named(thing.size, SIZES)
    found[12] = _named(scene.relation, RELATIONS)
    found[13] = _named(scene.place, PLACES)
    found[14] = _named(scene.background, BACKGROUNDS)
    return found


def _named(name: str | None, names: Iterable[str]) -> int:
    return 1 + list(names).index(name) if name else 0


def drop_captions(captions: list[str], said: Tensor, draw: Draw) -> tuple[list[str], Tensor]:
    """Empty a share of the captions, and what they say [B, 15], for the unconditional model."""
    dropped = draw.scenes.random(len(captions)) < _DROPPED
    prompts = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
    return prompts, said.masked_fill(torch.from_numpy(dropped)[:, None], 0)


class CaptionReader(nn.Module):
    """Linear maps from each of T5's states and from CLIP's to the facts; only used in training."""

    def __init__(self, text: TextEncoders) -> None:
        super().__init__()
        self.states = nn.Linear(text.t5.config.d_model, sum(_KINDS))
        self.pooled = nn.Linear(text.clip.config.hidden_size, sum(_KINDS))

    def forward(self, states: Tensor, pooled: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of each fact, [B, S, kinds] from the states and [B, kinds] from CLIP's state."""
        return (
            list(self.states(states).float().split(_KINDS, dim=-1)),
            list(self.pooled(pooled).float().split(_KINDS, dim=-1)),
        )

    def loss(self, text: tuple[Tensor, Tensor], said: Tensor) -> Tensor:
        """Cross-entropy of the facts `said` uint8 [B, 15], summed over them and both encoders."""
        total = torch.zeros((), device=said.device)
        for index, (states, pooled) in enumerate(zip(*self(*text), strict=True)):
            fact = said[:, index].long()
            everywhere = fact[:, None].expand(states.shape[:2]).flatten()
            total = total + nn.functional.cross_entropy(states.flatten(0, 1), everywhere)
            total = total + nn.functional.cross_entropy(pooled, fact)
        return total


class TextStage:
    """Every state of T5 and CLIP's pooled one learn to tell all facts of the caption."""

    def __init__(self, text: TextEncoders, batch: int, device: torch.device) -> None:
        self.reader = CaptionReader(text).to(device)
        self.networks = nn.ModuleDict({"text": text, "reader": self.reader})
        self._text, self._batch, self._device = text, batch, device

    def loss(self, draw: Draw) -> dict[str, Tensor]:
        scenes = [sample_scene(draw.scenes) for _ in range(self._batch)]
        captions = [caption(scene, draw.scenes) for scene in scenes]
        said = torch.from_numpy(np.stack([facts(scene) for scene in scenes]))
        prompts, said = drop_captions(captions, said, draw)
        return {"facts": self.reader.loss(self._text(prompts), said.to(self._device))}
