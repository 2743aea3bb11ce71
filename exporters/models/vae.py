"""What the VAE of FLUX.1 is made of (the autoencoder of latent diffusion, Rombach et al. 2022).

Convolutions compute in the type of their weights; group norms, softmax and the nearest-neighbour
upsampling in float32, since FP16 norms overflow and TensorRT has no bfloat16 Resize.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporters.models.attention import attention

__all__ = [
    "Downsample",
    "InputConv",
    "Moments",
    "OutputConv",
    "ResnetBlock",
    "SpatialAttention",
    "Upsample",
]


class GroupNorm(nn.GroupNorm):
    """Group norm in float32, back in the input's type; optionally with SiLU in between."""

    def forward(self, x: Tensor, activate: bool = True) -> Tensor:
        y = F.group_norm(
            x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps
        )
        return (F.silu(y) if activate else y).to(x.dtype)


class ResnetBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))), with a 1×1 shortcut where the channels change."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + y


class SpatialAttention(nn.Module):
    """Self-attention over the pixels of a feature map, one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x, activate=False).flatten(2).transpose(1, 2)[:, None]
        y = attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), x.shape[1] ** -0.5)
        return x + self.to_out[0](y[:, 0]).transpose(1, 2).reshape(x.shape)


class Upsample(nn.Module):
    """Twice the rows and columns by nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x.float(), scale_factor=2.0, mode="nearest").to(x.dtype))


class Downsample(nn.Module):
    """Half the rows and columns: padding right and below only, then a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class InputConv(nn.Module):
    """The first convolution of either half, in the type of its weights."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_in(x.to(self.conv_in.weight.dtype))


class OutputConv(nn.Module):
    """The end of either half: norm, SiLU, convolution; float32."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.conv_norm_out = GroupNorm(groups, channels_in, eps=1e-6)
        self.conv_out = nn.Conv2d(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv_norm_out(x)).float()


class Moments(OutputConv):
    """The end of the encoder: the latents' mean and log-variance, float32 [B, C, h, w] each."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mean, logvar = torch.chunk(super().forward(x), 2, dim=1)
        return mean, logvar
