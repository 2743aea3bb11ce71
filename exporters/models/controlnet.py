"""What a ControlNet has besides the blocks of an MM-DiT.

A ControlNet (Zhang et al., 2023, arXiv 2302.05543) is a copy of a network's first blocks that also
sees a control picture. What each of its blocks leaves is projected, and added to the network's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporters.models.mmdit import DOUBLE_ROWS, SINGLE_ROWS

__all__ = [
    "ControlProjection",
    "Hint",
    "ImageResidual",
    "ModeEmbedding",
    "Prepend",
    "RepeatFirst",
    "Residual",
    "StackResiduals",
]


class ControlProjection(nn.Module):
    """What a step does before the blocks: project latents and control, hand each block its rows."""

    def __init__(
        self,
        channels: tuple[int, int],
        width: int,
        double: int,
        single: int,
        residual: torch.dtype,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.rows = [DOUBLE_ROWS] * double + [SINGLE_ROWS] * single
        self.x_embedder = nn.Linear(channels[0], width)
        self.controlnet_x_embedder = nn.Linear(channels[1], width)

    def forward(
        self, hidden_states: Tensor, control: Tensor, context: Tensor, modulation: Tensor
    ) -> tuple[Tensor, ...]:
        """Returns hidden [B,L,D], context [B,S,D] and the rows of each block, in order."""
        dtype = self.x_embedder.weight.dtype
        hidden = self.x_embedder(hidden_states.to(dtype))
        hidden = hidden + self.controlnet_x_embedder(control.to(dtype))
        return (
            hidden.to(self.residual),
            context.to(self.residual),
            *modulation.split(self.rows, dim=1),
        )


class Prepend(nn.Module):
    """The embedding of a control's kind [B,1,D] as one text token more, before the others."""

    def forward(self, mode: Tensor, context: Tensor) -> Tensor:
        return torch.cat((mode.to(context.dtype), context), dim=1)


class RepeatFirst(nn.Module):
    """A table of positions whose first row, the first text token's, stands there twice."""

    def forward(self, table: Tensor) -> Tensor:
        return torch.cat((table[:1], table), dim=0)


class _Projection(nn.Module):
    """A linear whose parameters are the module's own, as the checkpoint names them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        self.bias = nn.Parameter(torch.empty(width))

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).float()


class Residual(_Projection):
    """What a double-stream block leaves, as it is added in the transformer: [B,L,D], float32."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.project(hidden)


class ImageResidual(_Projection):
    """What a single-stream block leaves of the image's tokens, as it is added: [B,L,D], float32."""

    def forward(self, joint: Tensor, context: Tensor) -> Tensor:
        return self.project(joint[:, context.shape[1] :])


class StackResiduals(nn.Module):
    """The residuals of all blocks of a kind, in order, as one tensor [n,B,L,D]."""

    def forward(self, *residuals: Tensor) -> Tensor:
        return torch.stack(residuals)


class ModeEmbedding(nn.Module):
    """The kind of a control, int32 [B,1], as a text token [B,1,D], float32."""

    def __init__(self, modes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(modes, width))

    def forward(self, control_mode: Tensor) -> Tensor:
        return F.embedding(control_mode, self.weight).float()


class Hint(nn.Module):
    """Pixels [B,3,H,W] through convolutions to packed tokens [B,L,C], float32."""

    def __init__(self, channels: tuple[int, ...], patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        first, *levels, last = channels
        self.conv_in = nn.Conv2d(3, first, 3, padding=1)
        self.blocks = nn.ModuleList()
        before = first
        for width in levels:
            self.blocks.append(nn.Conv2d(before, before, 3, padding=1))
            self.blocks.append(nn.Conv2d(before, width, 3, padding=1, stride=2))
            before = width
        self.conv_out = nn.Conv2d(before, last, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.silu(self.conv_in(images.to(self.conv_in.weight.dtype)))
        for block in self.blocks:
            x = F.silu(block(x))
        x = self.conv_out(x).unflatten(2, (-1, self.patch_size))
        x = x.unflatten(4, (-1, self.patch_size)).permute(0, 2, 4, 1, 3, 5)
        return x.flatten(3).flatten(1, 2).float()
