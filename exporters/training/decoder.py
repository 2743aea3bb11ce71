"""The decoder stage: the VAE's decoder alone goes on learning, over an encoder that stays."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from exporters.training.data import draw_batch, to_tensor
from exporters.training.loop import Draw, Recipe

__all__ = ["RECIPE", "DecoderStage"]

RECIPE = Recipe("decoder", steps=2400, rate=2e-3, matrix_rate=2e-3, ema=0.995)

_NOISE = 0.25


class DecoderStage:
    """Whole pictures from their latents, in absolute and squared error.

    The decoder's group norms see all of a picture, so that one that mostly saw windows around
    things, as in the VAE's stage, gets colours wrong where a thing is small. Latents have noise of
    up to a quarter of their strength, since a sampler's are never exact.
    """

    def __init__(self, vae: AutoencoderKL, batch: int, device: torch.device) -> None:
        self.networks = nn.ModuleDict({"decoder": vae.decoder})
        vae.decoder.requires_grad_(True)
        self._vae, self._batch, self._device = vae, batch, device

    def loss(self, draw: Draw) -> dict[str, Tensor]:
        pictures, _, _ = draw_batch(draw.scenes, self._batch)
        images = to_tensor(pictures).to(self._device, memory_format=torch.channels_last)
        with torch.no_grad():
            latents = self._vae.encode(images).latent_dist.mean.float()
        noise = draw.normal(*latents.shape).to(self._device)
        strength = _NOISE * draw.uniform(len(latents), 1, 1, 1).to(self._device)
        decoded = self._vae.decode(latents + strength * latents.std() * noise).sample.float()
        return {
            "difference": (decoded - images).abs().mean(),
            "square": (decoded - images).square().mean(),
        }
