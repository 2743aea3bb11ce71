"""The VAE stage: FLUX.1's kind of autoencoder, 16 channels at an eighth of the size."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from exporters.training.data import draw_batch, draw_windows, labels, pack, to_tensor
from exporters.training.loop import Draw, Recipe, half_precision
from exporters.training.reader import Reader

__all__ = ["RECIPE", "VaeStage", "encode", "encode_images", "make_vae"]

RECIPE = Recipe("vae", steps=2200, rate=2e-3, matrix_rate=2e-3, ema=0.995)

_CHANNELS = (16, 16, 32, 64)
_DIVERGENCE = 1e-4
_LATENT_NOISE = 0.5
_READING = 0.05


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


def _draw_images(draw: Draw, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # More than half of the batches are windows around a thing: flat ground teaches little.
    if draw.scenes.random() < 0.4:
        pictures, _, drawings = draw_batch(draw.scenes, batch)
        marks = np.stack([labels(drawing) for drawing in drawings])
    else:
        pictures, marks = draw_windows(draw.scenes, batch)
    images = to_tensor(pictures).to(device, memory_format=torch.channels_last)
    return images, torch.from_numpy(marks).to(device)


class VaeStage:
    """Reconstruction in absolute and squared error; latents are pulled lightly to a normal.

    The decoder sees latents with noise of up to half their own strength, since what a sampler hands
    it is never exact; so the encoder learns a code that noise does not spoil, which is easier to
    generate (J. Yang and others, "Latent Denoising Makes Good Visual Tokenizers", 2025). A linear
    `reader` has to tell from each token's latents what lies there, for the same end (J. Yao and
    others, "Reconstruction vs. Generation", 2025, with the scenes' own labels in the place of
    another network's features).
    """

    def __init__(self, vae: AutoencoderKL, batch: int, device: torch.device) -> None:
        self._reader = Reader(4 * vae.config.latent_channels).to(device)
        self.networks = nn.ModuleDict({"vae": vae, "reader": self._reader})
        self._vae, self._batch, self._device = vae, batch, device

    def loss(self, draw: Draw) -> dict[str, Tensor]:
        images, marks = _draw_images(draw, self._batch, self._device)
        posterior = self._vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = draw.normal(*mean.shape).to(self._device)
        strength = _LATENT_NOISE * draw.uniform(len(mean), 1, 1, 1).to(self._device)
        spread = torch.exp(0.5 * logvar) + strength * mean.detach().std()
        latents = mean + spread * noise
        decoded = self._vae.decode(latents).sample.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return {
            "difference": (decoded - images).abs().mean(),
            "square": (decoded - images).square().mean(),
            "divergence": _DIVERGENCE * divergence,
            "reading": _READING * self._reader.loss(pack(latents), marks),
        }


def encode(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> Tensor:
    """Latents, not scaled, of pictures uint8 [B, H, W, 3]: see `encode_images`."""
    return encode_images(vae, to_tensor(pictures).to(device))


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents, not scaled, of images [B, 3, H, W]: the posterior's mean, [B, 16, H/8, W/8]."""
    with half_precision(images.device):
        posterior = vae.encode(images.to(memory_format=torch.channels_last)).latent_dist
    latents: Tensor = posterior.mean.float()
    return latents
