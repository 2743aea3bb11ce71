"""The sizes of a checkpoint's networks, read from the tensors' own shapes where they tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from exporters.checkpoint.tensors import Weights
from fluxdeploy.errors import CheckpointError

__all__ = ["TransformerConfig", "VaeConfig", "count_blocks"]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of an MM-DiT.

    axes_dims, theta: RoPE's split of a head's channels over the axes of an id, and the base of its
        frequencies. patch_size: a token is a patch of so many latents a side. No checkpoint records
        the last two: they are the family's.
    """

    in_channels: int
    out_channels: int
    width: int
    head_dim: int
    mlp_width: int
    double_blocks: int
    single_blocks: int
    text_width: int
    pooled_width: int
    guidance_embedding: bool
    axes_dims: tuple[int, ...]
    theta: float = 10000.0
    patch_size: int = 2

    @property
    def modulation_rows(self) -> int:
        """M: 12 a double-stream block, 3 a single-stream block, 2 for the final AdaLN."""
        return 12 * self.double_blocks + 3 * self.single_blocks + 2

    @classmethod
    def of(cls, weights: Weights, config: Mapping[str, object]) -> TransformerConfig:
        """The sizes of `weights`; `config` (of diffusers) only for what shapes do not tell.

        Raises `CheckpointError` where neither tells how RoPE splits a head, or where the sizes
        contradict each other.
        """
        double = count_blocks(weights, r"transformer_blocks\.(\d{1,9})\.")
        single = count_blocks(weights, r"single_transformer_blocks\.(\d{1,9})\.")
        if not double + single:
            raise CheckpointError("The transformer has no blocks: it is not a FLUX.1 model.")
        first = "transformer_blocks.0" if double else "single_transformer_blocks.0"
        mlp = f"{first}.ff.net.0.proj" if double else f"{first}.proj_mlp"
        head_dim = _shape(weights, f"{first}.attn.norm_q.weight", 1)[0]
        width, in_channels = _shape(weights, "x_embedder.weight", 2)
        if width % head_dim:
            raise CheckpointError(
                f"The transformer's width {width} is no multiple of its head size {head_dim}."
            )
        return cls(
            in_channels=in_channels,
            out_channels=_shape(weights, "proj_out.weight", 2)[0],
            width=width,
            head_dim=head_dim,
            mlp_width=_shape(weights, f"{mlp}.weight", 2)[0],
            double_blocks=double,
            single_blocks=single,
            text_width=_shape(weights, "context_embedder.weight", 2)[1],
            pooled_width=_shape(weights, "time_text_embed.text_embedder.linear_1.weight", 2)[1],
            guidance_embedding=("time_text_embed.guidance_embedder.linear_1.weight" in weights),
            axes_dims=_axes_dims(config.get("axes_dims_rope"), head_dim),
        )


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of a VAE.

    channels: of each level, from the picture's. layers: residual blocks a level, one more in the
        decoder. encoder: whether there is one beside the decoder.
    """

    latent_channels: int
    channels: tuple[int, ...]
    layers: int
    groups: int
    scaling_factor: float
    shift_factor: float
    encoder: bool = True

    @property
    def spatial_factor(self) -> int:
        """Image pixels per latent row or column."""
        return 1 << (len(self.channels) - 1)

    @classmethod
    def of(cls, weights: Weights, config: Mapping[str, object]) -> VaeConfig:
        """The sizes of `weights`; constants from `config` (of diffusers), else FLUX.1's own."""
        if "post_quant_conv.weight" in weights or "quant_conv.weight" in weights:
            raise CheckpointError(
                "The VAE has quant convolutions, which FLUX.1's has not: it belongs to another "
                "model family."
            )
        encoder = any(name.startswith("encoder.") for name in weights)
        channels, layers = _vae_levels(weights, encoder)
        groups = int(_number(config, "norm_num_groups", 32))
        if groups < 1 or any(width % groups for width in channels):
            raise CheckpointError(
                f"The VAE's channels {list(channels)} do not split into {groups} groups: its "
                'config.json must name the right "norm_num_groups".'
            )
        return cls(
            latent_channels=_shape(weights, "decoder.conv_in.weight", 4)[1],
            channels=channels,
            layers=layers,
            groups=groups,
            scaling_factor=_number(config, "scaling_factor", 0.3611),
            shift_factor=_number(config, "shift_factor", 0.1159),
            encoder=encoder,
        )


def _vae_levels(weights: Weights, encoder: bool) -> tuple[tuple[int, ...], int]:
    """The channels of a VAE's levels, from the picture's, and the residual blocks of a level."""
    side, more = ("encoder.down_blocks", 0) if encoder else ("decoder.up_blocks", 1)
    pattern = re.escape(side)
    levels = count_blocks(weights, rf"{pattern}\.(\d{{1,9}})\.")
    if not levels:
        raise CheckpointError(f"The VAE has no {side}: it is not FLUX.1's.")
    channels = [_shape(weights, f"{side}.{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)]
    blocks = count_blocks(weights, rf"{pattern}\.0\.resnets\.(\d{{1,9}})\.")
    return tuple(channels if encoder else reversed(channels)), blocks - more


def count_blocks(weights: Weights, pattern: str) -> int:
    """How many blocks are numbered by `pattern`."""
    found = {int(match[1]) for name in weights if (match := re.match(pattern, name))}
    if found and max(found) + 1 != len(found):
        missing = next(i for i in range(len(found)) if i not in found)
        raise CheckpointError(
            f"The checkpoint has {pattern.split(chr(92))[0]} up to number {max(found)}, "
            f"but not number {missing}: it is incomplete."
        )
    return len(found)


def _shape(weights: Weights, name: str, rank: int) -> tuple[int, ...]:
    if name not in weights:
        raise CheckpointError(
            f"The checkpoint has no tensor {name}: it is incomplete, or not a FLUX.1 model."
        )
    shape = weights[name].shape
    if len(shape) != rank:
        raise CheckpointError(
            f"Tensor {weights[name].name} in {weights[name].file} has shape {list(shape)}; "
            f"{rank} axes are needed."
        )
    if 0 in shape:
        raise CheckpointError(
            f"Tensor {weights[name].name} in {weights[name].file} is empty: its shape is "
            f"{list(shape)}."
        )
    return shape


def _number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{key} in the VAE's config.json is {value!r}; a number is needed.")
    return value


def _axes_dims(value: object, head_dim: int) -> tuple[int, ...]:
    if value is None:
        if head_dim != 128:
            raise CheckpointError(
                f"Heads have {head_dim} channels, and how RoPE splits them is not in the tensors: "
                'put a config.json with "axes_dims_rope" beside the transformer.'
            )
        return (16, 56, 56)
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 3
        or not all(isinstance(d, int) and d > 0 and d % 2 == 0 for d in value)
        or sum(value) != head_dim
    ):
        raise CheckpointError(
            f"The axes_dims_rope are {value!r}; three even sizes whose sum is the head size "
            f"{head_dim} are needed."
        )
    return tuple(value)
