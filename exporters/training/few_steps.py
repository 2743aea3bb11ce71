"""The few-steps stage: the guided model's path in four straight pieces, for the schnell kind."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from exporters.training.loop import Recipe
from exporters.training.networks import TextEncoders, make_transformer
from exporters.training.path import PathStage

__all__ = ["GUIDANCE", "RECIPE", "SHIFT", "few_steps_stage", "unguided_student"]

RECIPE = Recipe("few_steps", steps=480, rate=5e-4, matrix_rate=5e-4, warmup=20, ema=0.99)

GUIDANCE = 3.0
"""The guidance that the student is born with."""

SHIFT = 3.0
"""The student's schedule: noise levels s become SHIFT s / (1 + (SHIFT - 1) s)."""


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


def few_steps_stage(
    student: nn.Module, teacher: nn.Module, text: TextEncoders, batch: int, device: torch.device
) -> PathStage:
    """The path stage at the student's one guidance and schedule."""
    return PathStage(student, teacher, text, batch, device, fixed=(GUIDANCE, SHIFT))
