"""The VAE: `vae_decoder`, and `vae_encoder` where the checkpoint has one."""

from __future__ import annotations

import functools
import itertools

from torch import nn

from exporters.checkpoint.config import VaeConfig
from exporters.components.activations import vae_decoder_bytes, vae_encoder_bytes
from exporters.components.chain import Chain, Piece, Stage, Value
from exporters.components.component import Component
from exporters.components.pieces import ComputeType, floats, make_piece, value_of
from exporters.models import vae
from fluxdeploy.bundle.manifest import TensorSpec

__all__ = ["VAE_DECODER", "VAE_ENCODER"]


class _Half:
    """One half's stages, one after the other over a feature map; equal blocks are one piece."""

    def __init__(
        self, config: VaeConfig, compute: ComputeType, source: TensorSpec, scope: str
    ) -> None:
        self.stages: list[Stage] = []
        self._compute, self._groups, self._scope = compute, config.groups, scope
        self._pieces: dict[tuple[type[nn.Module], tuple[int, ...]], Piece] = {}
        self._features, self._value = source.name, value_of(source)

    def resnet(self, at: str, into: int, out: int) -> None:
        """A residual block from `into` to `out` channels."""
        self.add(vae.ResnetBlock, (into, out, self._groups), at, out)

    def middle(self, channels: int) -> None:
        """Residual block, attention, residual block."""
        self.resnet("mid_block.resnets.0.", channels, channels)
        sizes = (channels, self._groups)
        self.add(vae.SpatialAttention, sizes, "mid_block.attentions.0.", channels)
        self.resnet("mid_block.resnets.1.", channels, channels)

    def add(
        self,
        kind: type[nn.Module],
        sizes: tuple[int, ...],
        at: str,
        channels: int,
        writes: tuple[str, ...] = (),
    ) -> None:
        """The module `kind(*sizes)` with the tensors `at`, which gives so many channels.

        writes: the chain's outputs, where it gives these.
        """
        if (kind, sizes) not in self._pieces:
            build = functools.partial(kind, *sizes)
            self._pieces[kind, sizes] = make_piece(build, self._compute, self._value)
        piece, reads = self._pieces[kind, sizes], (self._features,)
        # Rows and columns have the same symbols at every resolution: none is known before it runs.
        self._value = Value(self._compute.dtype, ("B", channels, "h", "w"))
        self._features = f"features.{len(self.stages)}"
        self.stages.append(Stage(piece, reads, writes or (self._features,), self._scope + at))


def _vae_decoder_chain(config: VaeConfig, compute: ComputeType) -> Chain:
    """The VAE's decoder: unscaled latents [B,C,h,w] to images [B,3,H,W] in about -1..1."""
    latents = floats("latents", "B", config.latent_channels, "h", "w")
    half = _Half(config, compute, latents, "decoder.")
    widths = config.channels[::-1]
    half.add(vae.InputConv, (config.latent_channels, widths[0]), "", widths[0])
    half.middle(widths[0])
    for level, (into, out) in enumerate(itertools.pairwise((widths[0], *widths))):
        for block in range(config.layers + 1):
            half.resnet(f"up_blocks.{level}.resnets.{block}.", out if block else into, out)
        if level < len(widths) - 1:
            half.add(vae.Upsample, (out,), f"up_blocks.{level}.upsamplers.0.", out)
    half.add(vae.OutputConv, (widths[-1], 3, config.groups), "", 3, ("images",))
    outputs = (floats("images", "B", 3, "H", "W"),)
    return Chain("vae_decoder", (latents,), outputs, tuple(half.stages))


def _vae_encoder_chain(config: VaeConfig, compute: ComputeType) -> Chain:
    """The VAE's encoder: images in -1..1 to mean and log-variance, of which the host samples."""
    images = floats("images", "B", 3, "H", "W")
    half = _Half(config, compute, images, "encoder.")
    widths = config.channels
    half.add(vae.InputConv, (3, widths[0]), "", widths[0])
    for level, (into, out) in enumerate(itertools.pairwise((widths[0], *widths))):
        for block in range(config.layers):
            half.resnet(f"down_blocks.{level}.resnets.{block}.", out if block else into, out)
        if level < len(widths) - 1:
            half.add(vae.Downsample, (out,), f"down_blocks.{level}.downsamplers.0.", out)
    half.middle(widths[-1])
    moments, names = 2 * config.latent_channels, ("mean", "logvar")
    half.add(vae.Moments, (widths[-1], moments, config.groups), "", moments, names)
    outputs = tuple(floats(name, "B", config.latent_channels, "h", "w") for name in names)
    return Chain("vae_encoder", (images,), outputs, tuple(half.stages))


VAE_DECODER = Component(
    name="vae_decoder",
    part="vae",
    chain=lambda networks, compute: _vae_decoder_chain(networks.vae, compute),
    activations=vae_decoder_bytes,
    turn="decode",
    overflows_fp16=True,
    one_head=True,
)

VAE_ENCODER = Component(
    name="vae_encoder",
    part="vae",
    chain=lambda networks, compute: _vae_encoder_chain(networks.vae, compute),
    activations=vae_encoder_bytes,
    present=lambda networks: networks.vae.encoder,
    overflows_fp16=True,
    one_head=True,
)
