"""The sizes of a checkpoint's networks, read from the tensors' own shapes where they tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporters.checkpoint.agreement import check_class, check_said, unknown_keys
from exporters.checkpoint.tensors import Weights
from fluxdeploy.errors import CheckpointError

__all__ = [
    "TransformerConfig",
    "VaeConfig",
    "block_sizes",
    "count_blocks",
    "is_guided",
    "shape_of",
]

_FLUX_WIDTH, _FLUX_BLOCKS = 3072, (19, 38)
"""The width of FLUX.1's own transformer, and its double-stream and single-stream blocks."""

_TRANSFORMER_KEYS = (
    "patch_size",
    "in_channels",
    "out_channels",
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)
_VAE_KEYS = (
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "latent_channels",
    "norm_num_groups",
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
)
_SILU = ("silu", "swish")


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
        """The sizes of `weights`; `config` (of diffusers) for what shapes do not tell.

        Raises `CheckpointError` where neither tells how RoPE splits a head, and where the sizes
        contradict each other or the config.
        """
        check_class("transformer", config, "FluxTransformer2DModel")
        sizes = cls(
            **block_sizes("transformer", weights, config),
            out_channels=shape_of(weights, "proj_out.weight", 2)[0],
        )
        check_said("transformer", config, sizes._in_words_of_diffusers(config))
        # Diffusers would pass over a guidance embedding, and draw another picture.
        if sizes.guidance_embedding and "_class_name" in config and "guidance_embeds" not in config:
            raise CheckpointError(
                "The transformer has a guidance embedding, and its config.json does not say "
                '"guidance_embeds": true, which diffusers takes for false: add it.'
            )
        return sizes

    def _in_words_of_diffusers(self, config: Mapping[str, object]) -> dict[str, object]:
        """What a config.json has to say, where it says anything."""
        # Null stands for as many as go in.
        in_as_out = self.in_channels == self.out_channels and config.get("out_channels", 0) is None
        return {
            # Latents come packed.
            "patch_size": 1,
            "in_channels": self.in_channels,
            "out_channels": None if in_as_out else self.out_channels,
            "num_layers": self.double_blocks,
            "num_single_layers": self.single_blocks,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.width // self.head_dim,
            "joint_attention_dim": self.text_width,
            "pooled_projection_dim": self.pooled_width,
            "guidance_embeds": self.guidance_embedding,
        }

    def notices(self, config: Mapping[str, object]) -> tuple[str, ...]:
        """A sentence for each thing in a checkpoint that may not be meant."""
        told = unknown_keys("The transformer's config.json", config, _TRANSFORMER_KEYS)
        blocks = (self.double_blocks, self.single_blocks)
        if not config and self.width == _FLUX_WIDTH and blocks != _FLUX_BLOCKS:
            told += (
                f"The transformer has {blocks[0]} double-stream and {blocks[1]} single-stream "
                f"blocks, FLUX.1's {_FLUX_BLOCKS[0]} and {_FLUX_BLOCKS[1]}: it is a pruned model, "
                "or its file is incomplete",
            )
        return told


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
    def of(cls, weights: Weights, given: Mapping[str, object] | None) -> VaeConfig:
        """The sizes of `weights`; constants from the config.json (of diffusers) that was `given`.

        What it lacks is diffusers' own default, and without any config FLUX.1's. Raises
        `CheckpointError` where it contradicts the tensors, and for what is not computed.
        """
        config = {} if given is None else given
        check_class("VAE", config, "AutoencoderKL")
        if "post_quant_conv.weight" in weights or "quant_conv.weight" in weights:
            raise CheckpointError(
                "The VAE has quant convolutions, which FLUX.1's has not: it belongs to another "
                "model family."
            )
        encoder = any(name.startswith("encoder.") for name in weights)
        channels, layers = _vae_levels(weights, encoder)
        groups = _number(config, "norm_num_groups", 32)
        if groups < 1 or any(width % groups for width in channels):
            raise CheckpointError(
                f"The VAE's channels {list(channels)} do not split into {groups:g} groups: its "
                'config.json must name the right "norm_num_groups".'
            )
        sizes = cls(
            latent_channels=shape_of(weights, "decoder.conv_in.weight", 4)[1],
            channels=channels,
            layers=layers,
            groups=int(groups),
            scaling_factor=_scaling_factor(given),
            shift_factor=_shift_factor(given),
            encoder=encoder,
        )
        check_said("VAE", config, sizes._in_words_of_diffusers(weights))
        _check_computed(config)
        return sizes

    def _in_words_of_diffusers(self, weights: Weights) -> dict[str, object]:
        """What a config.json has to say, where it says anything."""
        levels = len(self.channels)
        return {
            "in_channels": 3,
            "out_channels": shape_of(weights, "decoder.conv_out.weight", 4)[0],
            "block_out_channels": self.channels,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "layers_per_block": self.layers,
            "latent_channels": self.latent_channels,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": True,
        }

    @staticmethod
    def notices(config: Mapping[str, object]) -> tuple[str, ...]:
        """A sentence for each thing in a checkpoint that may not be meant."""
        return unknown_keys("The VAE's config.json", config, _VAE_KEYS)


def _scaling_factor(config: Mapping[str, object] | None) -> float:
    """FLUX.1's own without a config, else diffusers' default where it has none."""
    factor = 0.3611 if config is None else _number(config, "scaling_factor", 0.18215)
    if factor == 0:
        raise CheckpointError("The VAE's config.json says scaling_factor 0, which divides latents.")
    return factor


def _shift_factor(config: Mapping[str, object] | None) -> float:
    """FLUX.1's own without a config; diffusers has no default for it, and draws nothing then."""
    if config is None:
        return 0.1159
    if config.get("shift_factor") is None:
        raise CheckpointError(
            "The VAE's config.json has no shift_factor, without which no FLUX.1 picture is "
            "decoded: add the one that it was trained with (FLUX.1's is 0.1159)."
        )
    return _number(config, "shift_factor", 0.0)


def _check_computed(config: Mapping[str, object]) -> None:
    """Raise `CheckpointError` for what no tensor tells and nobody here computes."""
    activation = config.get("act_fn", "silu")
    if activation not in _SILU:
        raise CheckpointError(
            f"The VAE's config.json says act_fn {activation!r:.80}; silu is the one that is "
            "computed, as FLUX.1's."
        )
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise CheckpointError(
                f"The VAE's config.json sets {key}, which FLUX.1's has not: it belongs to another "
                "model family."
            )


def _vae_levels(weights: Weights, encoder: bool) -> tuple[tuple[int, ...], int]:
    """The channels of a VAE's levels, from the picture's, and the residual blocks of a level."""
    side, more = ("encoder.down_blocks", 0) if encoder else ("decoder.up_blocks", 1)
    pattern = re.escape(side)
    levels = count_blocks(weights, rf"{pattern}\.(\d{{1,9}})\.")
    if not levels:
        raise CheckpointError(f"The VAE has no {side}: it is not FLUX.1's.")
    channels = [
        shape_of(weights, f"{side}.{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)
    ]
    blocks = count_blocks(weights, rf"{pattern}\.0\.resnets\.(\d{{1,9}})\.")
    return tuple(channels if encoder else reversed(channels)), blocks - more


def block_sizes(what: str, weights: Weights, config: Mapping[str, object]) -> dict[str, Any]:
    """The sizes that an MM-DiT and a ControlNet share, by their names in `TransformerConfig`.

    Raises `CheckpointError`, which calls the network `what`.
    """
    double = count_blocks(weights, r"transformer_blocks\.(\d{1,9})\.")
    single = count_blocks(weights, r"single_transformer_blocks\.(\d{1,9})\.")
    if not double + single:
        raise CheckpointError(f"The {what} has no blocks: it is not one of FLUX.1's.")
    first = "transformer_blocks.0" if double else "single_transformer_blocks.0"
    mlp = f"{first}.ff.net.0.proj" if double else f"{first}.proj_mlp"
    head_dim = shape_of(weights, f"{first}.attn.norm_q.weight", 1)[0]
    width, in_channels = shape_of(weights, "x_embedder.weight", 2)
    if width % head_dim:
        raise CheckpointError(
            f"The {what}'s width {width} is no multiple of its head size {head_dim}."
        )
    return {
        "in_channels": in_channels,
        "width": width,
        "head_dim": head_dim,
        "mlp_width": shape_of(weights, f"{mlp}.weight", 2)[0],
        "double_blocks": double,
        "single_blocks": single,
        "text_width": shape_of(weights, "context_embedder.weight", 2)[1],
        "pooled_width": shape_of(weights, "time_text_embed.text_embedder.linear_1.weight", 2)[1],
        "guidance_embedding": is_guided(weights),
        "axes_dims": _axes_dims(config.get("axes_dims_rope"), head_dim),
    }


def is_guided(weights: Weights) -> bool:
    """Whether an MM-DiT has a guidance embedding, as FLUX.1-dev's and not as schnell's."""
    return "time_text_embed.guidance_embedder.linear_1.weight" in weights


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


def shape_of(weights: Weights, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor of so many axes. Raises `CheckpointError` for anything else."""
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
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{key} in the VAE's config.json is {value!r}; a number is needed.")
    return value


def _axes_dims(value: object, head_dim: int) -> tuple[int, ...]:
    """How RoPE splits a head, by a config's `axes_dims_rope`; FLUX.1's own way without one.

    Raises `CheckpointError` for what is no split of it.
    """
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
