"""The few-steps stage: the guided model's path in four straight pieces, for the schnell kind."""

from __future__ import annotations

import itertools

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from exporters.training.data import draw_size
from exporters.training.loop import Draw, Recipe
from exporters.training.networks import TextEncoders, make_transformer, velocity
from fluxdeploy.demo.scenes import caption, sample_scene

__all__ = ["GUIDANCE", "RECIPE", "SHIFT", "FewStepsStage", "unguided_student"]

RECIPE = Recipe("few_steps", steps=240, rate=5e-4, matrix_rate=5e-4, warmup=20, ema=0.99)

GUIDANCE = 3.0
"""The guidance that the student is born with."""

SHIFT = 3.0
"""The student's schedule: noise levels s become SHIFT s / (1 + (SHIFT - 1) s)."""

_STEPS = 4
_TEACHER_STEPS = 3


def unguided_student(teacher: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The teacher at one guidance, without its guidance embedding: the same function.

    The embedding of one guidance is a constant that is added to the pooled prompt's, so it moves
    into that linear's bias.
    """
    student = make_transformer(guidance_embedding=False)
    student.load_state_dict(teacher.state_dict(), strict=False)
    embed = teacher.time_text_embed
    device = next(teacher.parameters()).device
    with torch.no_grad():
        projected = embed.time_proj(torch.tensor([1000 * GUIDANCE], device=device))
        constant = embed.guidance_embedder(projected)[0].cpu()
        student.time_text_embed.text_embedder.linear_2.bias += constant
    return student


class FewStepsStage:
    """Progressive distillation (T. Salimans and J. Ho, 2022) along the student's own path.

    From pure noise, the teacher solves each of four pieces of the path in three Euler steps; the
    student is to cover the piece in one, and the next piece starts where the student arrived, so
    that it learns to repair its own errors.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        text: TextEncoders,
        batch: int,
        device: torch.device,
    ) -> None:
        self.networks = nn.ModuleDict({"transformer": student})
        self._student, self._teacher = student, teacher.eval().requires_grad_(False)
        self._text = text.eval().requires_grad_(False)
        self._batch, self._device = batch, device

    def loss(self, draw: Draw) -> dict[str, Tensor]:
        size = draw_size(draw.scenes)
        captions = [caption(sample_scene(draw.scenes), draw.scenes) for _ in range(self._batch)]
        with torch.no_grad():
            text = self._text(captions)
        tokens = size[0] * size[1] // 256
        x = draw.normal(self._batch, tokens, 64).to(self._device)
        even = torch.linspace(1, 0, _STEPS + 1)
        levels = (SHIFT * even / (1 + (SHIFT - 1) * even)).tolist()
        terms = {}
        for start, end in itertools.pairwise(levels):
            goal = self._solve(x, start, end, text, size)
            t = torch.full((self._batch,), start, device=self._device)
            predicted = velocity(self._student, x, t, text, size)
            terms[f"from {start:.2f}"] = (predicted - (x - goal) / (start - end)).square().mean()
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
    ) -> Tensor:
        guidance = torch.full((self._batch,), GUIDANCE, device=self._device)
        step = (start - end) / _TEACHER_STEPS
        for index in range(_TEACHER_STEPS):
            t = torch.full((self._batch,), start - index * step, device=self._device)
            x = x - step * velocity(self._teacher, x, t, text, size, guidance)
        return x
