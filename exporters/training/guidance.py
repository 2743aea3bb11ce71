"""The guidance stage: classifier-free guidance distilled into a guidance embedding, as in dev."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from exporters.training.flow import LatentSet, noised
from exporters.training.loop import Draw, Recipe
from exporters.training.networks import TextEncoders, make_transformer, velocity

__all__ = ["RECIPE", "GuidanceStage", "draw_guidance", "guided_student"]

RECIPE = Recipe("guidance", steps=500, rate=5e-4, matrix_rate=5e-4, ema=0.995)

_STRONGEST = 6.0


def guided_student(teacher: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A copy of the teacher with a guidance embedding that has no effect yet."""
    student = make_transformer(guidance_embedding=True)
    student.load_state_dict(teacher.state_dict(), strict=False)
    last = student.time_text_embed.guidance_embedder.linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return student


def draw_guidance(draw: Draw, count: int) -> Tensor:
    """Strengths [B], uniform in [1, 6]."""
    return 1 + (_STRONGEST - 1) * draw.uniform(count)


class GuidanceStage:
    """The student at guidance w matches the teacher's v_empty + w (v_prompt - v_empty).

    C. Meng and others, "On Distillation of Guided Diffusion Models", 2022, first stage; w is
    that of `draw_guidance`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        text: TextEncoders,
        data: LatentSet,
        batch: int,
        device: torch.device,
    ) -> None:
        self.networks = nn.ModuleDict({"transformer": student})
        self._student, self._teacher = student, teacher.eval().requires_grad_(False)
        self._text, self._data = text.eval().requires_grad_(False), data
        self._batch, self._device = batch, device

    def loss(self, draw: Draw) -> dict[str, Tensor]:
        batch = self._data.batch(draw, self._batch, self._device)
        t, _, x = noised(batch.latents, draw)
        guidance = draw_guidance(draw, self._batch).to(self._device)
        with torch.no_grad():
            text, empty = self._text(batch.captions), self._text([""] * self._batch)
            towards = velocity(self._teacher, x, t, text, batch.size)
            away = velocity(self._teacher, x, t, empty, batch.size)
            target = away + guidance[:, None, None] * (towards - away)
        predicted = velocity(self._student, x, t, text, batch.size, guidance)
        return {"guidance": (predicted - target).square().mean()}
