"""The VAE of FLUX.1 (the autoencoder of latent diffusion, Rombach et al. 2022), both halves.

Convolutions compute in the type of their weights; group norms, softmax and the nearest-neighbour
upsampling in float32, since FP16 norms overflow and TensorRT has no bfloat16 Resize.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporters.models.attention import attention

__all__ = ["VaeDecoder", "VaeEncoder"]


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
        return x + self.to_out[0](y[:, 0]).transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


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


class Level(nn.Module):
    """The residual blocks of one resolution, then a change of resolution (none at the end)."""

    def __init__(
        self, channels_in: int, channels_out: int, blocks: int, groups: int, resample: str | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [
                ResnetBlock(channels_in if i == 0 else channels_out, channels_out, groups)
                for i in range(blocks)
            ]
        )
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(channels_out)])
        elif resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(channels_out)])

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            assert isinstance(child, nn.ModuleList)
            for module in child:
                x = module(x)
        return x


class VaeDecoder(nn.Module):
    """Latents [B,C,h,w], already unscaled, to images [B,3,8h,8w] in about -1..1, float32."""

    def __init__(
        self, latent_channels: int, channels: tuple[int, ...], layers: int, groups: int
    ) -> None:
        super().__init__()
        widths = channels[::-1]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            [
                Level(
                    widths[max(i - 1, 0)],
                    width,
                    layers + 1,
                    groups,
                    "up" if i < len(widths) - 1 else None,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latents.to(self.conv_in.weight.dtype)))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x)).float()


class VaeEncoder(nn.Module):
    """Images [B,3,H,W] in -1..1 to the latents' mean and log-variance [B,C,H/8,W/8], float32."""

    def __init__(
        self, latent_channels: int, channels: tuple[int, ...], layers: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                Level(
                    channels[max(i - 1, 0)],
                    width,
                    layers,
                    groups,
                    "down" if i < len(channels) - 1 else None,
                )
                for i, width in enumerate(channels)
            ]
        )
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv_in(images.to(self.conv_in.weight.dtype))
        for level in self.down_blocks:
            x = level(x)
        moments = self.conv_out(self.conv_norm_out(self.mid_block(x))).float()
        mean, logvar = torch.chunk(moments, 2, dim=1)
        return mean, logvar
