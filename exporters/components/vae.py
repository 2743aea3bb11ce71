"""The VAE: `vae_decoder`, and `vae_encoder` where the checkpoint has one."""

from __future__ import annotations

from exporters.checkpoint.config import VaeConfig
from exporters.components.activations import vae_decoder_bytes, vae_encoder_bytes
from exporters.components.chain import Chain, Stage
from exporters.components.component import Component
from exporters.components.pieces import ComputeType, floats, make_piece, value_of
from exporters.models import vae

__all__ = ["VAE_DECODER", "VAE_ENCODER"]


def _vae_decoder_chain(config: VaeConfig, compute: ComputeType) -> Chain:
    """The VAE's decoder."""
    latents = floats("latents", "B", config.latent_channels, "h", "w")
    piece = make_piece(
        lambda: vae.VaeDecoder(
            config.latent_channels, config.channels, config.layers, config.groups
        ),
        compute,
        value_of(latents),
    )
    stage = Stage(piece, ("latents",), ("images",), "decoder.")
    return Chain("vae_decoder", (latents,), (floats("images", "B", 3, "H", "W"),), (stage,))


def _vae_encoder_chain(config: VaeConfig, compute: ComputeType) -> Chain:
    """The VAE's encoder, up to mean and log-variance: the host samples."""
    images = floats("images", "B", 3, "H", "W")
    piece = make_piece(
        lambda: vae.VaeEncoder(
            config.latent_channels, config.channels, config.layers, config.groups
        ),
        compute,
        value_of(images),
    )
    outputs = tuple(
        floats(name, "B", config.latent_channels, "h", "w") for name in ("mean", "logvar")
    )
    stage = Stage(piece, ("images",), ("mean", "logvar"), "encoder.")
    return Chain("vae_encoder", (images,), outputs, (stage,))


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
