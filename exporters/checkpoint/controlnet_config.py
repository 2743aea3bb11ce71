"""The sizes of a ControlNet, read from the tensors' own shapes where they tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exporters.checkpoint.agreement import check_class, check_said, unknown_keys
from exporters.checkpoint.config import block_sizes, count_blocks, shape_of
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
        mode = "controlnet_mode_embedder.weight"
        sizes = cls(
            **block_sizes("ControlNet", weights, config),
            control_channels=shape_of(weights, "controlnet_x_embedder.weight", 2)[1],
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
