"""The path stage: the guided model learns along the paths that it samples itself."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from exporters.training.data import draw_size
from exporters.training.guidance import draw_guidance
from exporters.training.loop import Draw, Recipe
from exporters.training.networks import TextEncoders, velocity
from fluxdeploy.demo.scenes import caption, sample_scene

__all__ = ["RECIPE", "PathStage", "shifted_levels"]

RECIPE = Recipe("path", steps=300, rate=5e-4, matrix_rate=5e-4, warmup=20, ema=0.99)

_PIECES = 4
_SUBSTEPS = 3
_SHIFTS = (2.5, 4.5)


class PathStage:
    """Progressive distillation (T. Salimans and J. Ho, 2022) along the student's own path.

    From pure noise, the teacher solves each of four pieces of the path in three Euler steps; the
    student is to cover the piece in one, and the next piece starts where the student arrived, so
    that it learns to repair its own errors. That helps with any number of steps.

    fixed: a guidance and a shift of the noise levels, for a student that takes no guidance. Without
    it, every picture draws its guidance and every step its shift.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        text: TextEncoders,
        batch: int,
        device: torch.device,
        fixed: tuple[float, float] | None = None,
    ) -> None:
        self.networks = nn.ModuleDict({"transformer": student})
        self._student, self._teacher = student, teacher.eval().requires_grad_(False)
        self._text = text.eval().requires_grad_(False)
        self._batch, self._device = batch, device
        self._fixed = fixed

    def loss(self, draw: Draw) -> dict[str, Tensor]:
        size = draw_size(draw.scenes)
        captions = [caption(sample_scene(draw.scenes), draw.scenes) for _ in range(self._batch)]
        with torch.no_grad():
            text = self._text(captions)
        tokens = size[0] * size[1] // 256
        if self._fixed is None:
            guidance, shift = draw_guidance(draw, self._batch), draw.scenes.uniform(*_SHIFTS)
        else:
            guidance, shift = torch.full((self._batch,), self._fixed[0]), self._fixed[1]
        guidance = guidance.to(self._device)
        given = guidance if self._fixed is None else None
        x = draw.normal(self._batch, tokens, 64).to(self._device)
        terms = {}
        pieces = itertools.pairwise(shifted_levels(shift))
        for number, (start, end) in enumerate(pieces, 1):
            goal = self._solve(x, start, end, text, size, guidance)
            t = torch.full((self._batch,), start, device=self._device)
            predicted = velocity(self._student, x, t, text, size, given)
            wanted = (x - goal) / (start - end)
            terms[f"piece {number}"] = (predicted - wanted).square().mean()
            x = (x - (start - end) * predicted).detach()
        return terms

    @torch.no_grad()
    def _solve(
        self,
        x: Tensor,
        start: float,
        end: float,
        text: tuple[Tensor, Tensor],
        size: tuple[int, int],
        guidance: Tensor,
    ) -> Tensor:
        step = (start - end) / _SUBSTEPS
        for index in range(_SUBSTEPS):
            t = torch.full((self._batch,), start - index * step, device=self._device)
            x = x - step * velocity(self._teacher, x, t, text, size, guidance)
        return x


def shifted_levels(shift: float) -> list[float]:
    """The pieces' ends: from 1 to 0, evenly spaced s as shift s / (1 + (shift - 1) s)."""
    even = torch.linspace(1, 0, _PIECES + 1)
    levels: list[float] = (shift * even / (1 + (shift - 1) * even)).tolist()
    return levels
