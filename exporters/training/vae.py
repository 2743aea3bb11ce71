"""The VAE stage: FLUX.1's kind of autoencoder, 16 channels at an eighth of the size."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from exporters.training.data import draw_batch, draw_windows, to_tensor
from exporters.training.loop import Draw, Recipe

__all__ = ["DECODER_RECIPE", "RECIPE", "DecoderStage", "VaeStage", "encode", "make_vae"]

RECIPE = Recipe("vae", steps=2600, rate=2e-3, matrix_rate=2e-3, ema=0.995)

DECODER_RECIPE = Recipe("decoder", steps=600, rate=1e-3, matrix_rate=1e-3, ema=0.995)

_CHANNELS = (16, 16, 32, 64)
_DIVERGENCE = 1e-4
_LATENT_NOISE = 0.3


def make_vae() -> AutoencoderKL:
    """A small autoencoder in FLUX.1's configuration, not trained."""
    levels = len(_CHANNELS)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        # The posterior starts narrow: one as wide as the prior would hide the pictures for long.
        vae.encoder.conv_out.weight[vae.config.latent_channels :] = 0
        vae.encoder.conv_out.bias[vae.config.latent_channels :] = -5
    return vae.to(memory_format=torch.channels_last)


def _draw_images(draw: Draw, batch: int, device: torch.device) -> Tensor:
    # Half of the batches are windows around a thing: flat ground teaches little.
    if draw.scenes.random() < 0.4:
        pictures, _, _ = draw_batch(draw.scenes, batch)
    else:
        pictures = draw_windows(draw.scenes, batch)
    return to_tensor(pictures).to(device, memory_format=torch.channels_last)


def _differences(decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
    error = decoded.float() - images
    return {"difference": error.abs().mean(), "square": error.square().mean()}


class VaeStage:
    """Reconstruction in absolute and squared error; latents are pulled lightly to a normal."""

    def __init__(self, vae: AutoencoderKL, batch: int, device: torch.device) -> None:
        self.networks = nn.ModuleDict({"vae": vae})
        self._vae, self._batch, self._device = vae, batch, device

    def loss(self, draw: Draw) -> dict[str, Tensor]:
        images = _draw_images(draw, self._batch, self._device)
        posterior = self._vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = draw.normal(*mean.shape).to(self._device)
        decoded = self._vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return {**_differences(decoded, images), "divergence": _DIVERGENCE * divergence}


class DecoderStage:
    """The decoder alone, on latents with some noise: what a sampler hands it is never exact."""

    def __init__(self, vae: AutoencoderKL, batch: int, device: torch.device) -> None:
        vae.encoder.requires_grad_(False)
        self.networks = nn.ModuleDict({"decoder": vae.decoder})
        self._vae, self._batch, self._device = vae, batch, device

    def loss(self, draw: Draw) -> dict[str, Tensor]:
        images = _draw_images(draw, self._batch, self._device)
        with torch.no_grad():
            latents = self._vae.encode(images).latent_dist.mean.float()
        noise = draw.normal(*latents.shape).to(self._device)
        strength = _LATENT_NOISE * draw.uniform(len(latents), 1, 1, 1).to(self._device)
        decoded = self._vae.decode(latents + strength * latents.std() * noise).sample
        return _differences(decoded, images)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> Tensor:
    """Latents, not scaled: the posterior's mean, float32 [B, 16, H/8, W/8]."""
    images = to_tensor(pictures).to(device, memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16):
        latents: Tensor = vae.encode(images).latent_dist.mean.float()
    return latents
