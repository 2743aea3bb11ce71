"""The sizes of a ControlNet, read from the tensors' own shapes where they tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exporters.checkpoint.agreement import check_class, check_said, unknown_keys
from exporters.checkpoint.config import axes_dims_of, count_blocks, shape_of
from exporters.checkpoint.tensors import Weights
from fluxdeploy.errors import CheckpointError

__all__ = ["ControlNetConfig"]

_KEYS = (
    "patch_size",
    "in_channels",
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
    "num_mode",
    "conditioning_embedding_channels",
)


@dataclass(frozen=True)
class ControlNetConfig:
    """Sizes of a ControlNet, which is the first blocks of an MM-DiT.

    in_channels, control_channels: of a token of latents, and of what it is controlled by.
    modes: the kinds of control that one network tells apart; 0 where it has one alone.
    hint_channels: of each level of the convolutions that pixels go through, from the first, where
        it takes pixels and not the VAE's latents; empty where it takes latents.
    """

    in_channels: int
    control_channels: int
    width: int
    head_dim: int
    mlp_width: int
    double_blocks: int
    single_blocks: int
    text_width: int
    pooled_width: int
    guidance_embedding: bool
    axes_dims: tuple[int, ...]
    modes: int = 0
    hint_channels: tuple[int, ...] = ()

    @property
    def modulation_rows(self) -> int:
        """M: 12 a double-stream block, 3 a single-stream block; there is no final AdaLN."""
        return 12 * self.double_blocks + 3 * self.single_blocks

    @classmethod
    def of(cls, weights: Weights, config: Mapping[str, object]) -> ControlNetConfig:
        """The sizes of `weights`; `config` (of diffusers) for what shapes do not tell.

        Raises `CheckpointError` for what is no ControlNet of FLUX.1, and where the sizes contradict
        each other or the config.
        """
        check_class("ControlNet", config, "FluxControlNetModel")
        double = count_blocks(weights, r"transformer_blocks\.(\d{1,9})\.")
        single = count_blocks(weights, r"single_transformer_blocks\.(\d{1,9})\.")
        if not double + single:
            raise CheckpointError("The ControlNet has no blocks: it is not one of FLUX.1's.")
        first = "transformer_blocks.0" if double else "single_transformer_blocks.0"
        mlp = f"{first}.ff.net.0.proj" if double else f"{first}.proj_mlp"
        head_dim = shape_of(weights, f"{first}.attn.norm_q.weight", 1)[0]
        width, in_channels = shape_of(weights, "x_embedder.weight", 2)
        if width % head_dim:
            raise CheckpointError(
                f"The ControlNet's width {width} is no multiple of its head size {head_dim}."
            )
        mode = "controlnet_mode_embedder.weight"
        sizes = cls(
            in_channels=in_channels,
            control_channels=shape_of(weights, "controlnet_x_embedder.weight", 2)[1],
            width=width,
            head_dim=head_dim,
            mlp_width=shape_of(weights, f"{mlp}.weight", 2)[0],
            double_blocks=double,
            single_blocks=single,
            text_width=shape_of(weights, "context_embedder.weight", 2)[1],
            pooled_width=shape_of(weights, "time_text_embed.text_embedder.linear_1.weight", 2)[1],
            guidance_embedding="time_text_embed.guidance_embedder.linear_1.weight" in weights,
            axes_dims=axes_dims_of(config.get("axes_dims_rope"), head_dim),
            modes=shape_of(weights, mode, 2)[0] if mode in weights else 0,
            hint_channels=_hint_channels(weights),
        )
        check_said("ControlNet", config, sizes._in_words_of_diffusers())
        # Diffusers would pass over a guidance embedding, and draw another picture.
        if sizes.guidance_embedding and "guidance_embeds" not in config:
            raise CheckpointError(
                "The ControlNet has a guidance embedding, and its config.json does not say "
                '"guidance_embeds": true, which diffusers takes for false: add it.'
            )
        return sizes

    def _in_words_of_diffusers(self) -> dict[str, object]:
        """What a config.json has to say, where it says anything."""
        hint = self.hint_channels[-1] if self.hint_channels else None
        return {
            # Latents come packed, and pixels do not.
            "patch_size": 1 if hint is None else round((self.control_channels / hint) ** 0.5),
            "in_channels": self.in_channels,
            "num_layers": self.double_blocks,
            "num_single_layers": self.single_blocks,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.width // self.head_dim,
            "joint_attention_dim": self.text_width,
            "pooled_projection_dim": self.pooled_width,
            "guidance_embeds": self.guidance_embedding,
            "num_mode": self.modes or None,
            "conditioning_embedding_channels": hint,
        }

    @staticmethod
    def notices(config: Mapping[str, object]) -> tuple[str, ...]:
        """A sentence for each thing in a ControlNet that may not be meant."""
        return unknown_keys("The ControlNet's config.json", config, _KEYS)


def _hint_channels(weights: Weights) -> tuple[int, ...]:
    """Of the first convolution over pixels, of each pair after it, and of the last."""
    if not any(name.startswith("input_hint_block.") for name in weights):
        return ()
    blocks = count_blocks(weights, r"input_hint_block\.blocks\.(\d{1,9})\.")
    names = ["conv_in", *(f"blocks.{2 * i + 1}" for i in range(blocks // 2)), "conv_out"]
    return tuple(shape_of(weights, f"input_hint_block.{name}.weight", 4)[0] for name in names)
