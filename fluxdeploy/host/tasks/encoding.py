"""Given pictures as latents: what the VAE encoder makes of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.manifest import LatentSpec
from fluxdeploy.errors import EngineError, UsageError
from fluxdeploy.host.components import Run
from fluxdeploy.host.input_images import to_pixels
from fluxdeploy.host.request import GenerationRequest
from fluxdeploy.sampling.latents import latent_shape, pack, sample_posterior, scale
from fluxdeploy.sampling.noise import Generators

__all__ = [
    "check_count",
    "control_latents",
    "encode",
    "known_latents",
    "read_controls",
    "start_noise",
]


def check_count(what: str, count: int, pictures: int) -> None:
    """Raise `UsageError` where the `count` of something does not divide the pictures of a call."""
    if pictures % count != 0:
        raise UsageError(
            f"There are {count} {what} for {pictures} pictures. Give one for all, or as many as "
            "divide that number."
        )


def encode(
    images: NDArray[np.float32], spec: LatentSpec, run: Run
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and log-variance of the latents of pictures [B, 3, H, W] in -1..1, at the VAE's scale.

    Both are float32 [B, C, h, w]. Raises `EngineError` where the encoder gives other shapes.
    """
    encoded = [run("vae_encoder", {"images": image[None]}) for image in images]
    mean, logvar = (np.concatenate([each[n] for each in encoded]) for n in ("mean", "logvar"))
    count, _, height, width = images.shape
    shape = latent_shape(count, height, width, spec)
    if not mean.shape == logvar.shape == shape:
        raise EngineError(
            f"The vae_encoder gave {list(mean.shape)} and {list(logvar.shape)} where latents "
            f"are {list(shape)}. Build the bundle again with `fluxdeploy build`."
        )
    return mean, logvar


def known_latents(
    images: NDArray[np.float32],
    pictures: int,
    spec: LatentSpec,
    generator: Generators,
    run: Run,
) -> NDArray[np.float32]:
    """Drawn latents of the images of a call, float32 [B, C, h, w], at the transformer's scale.

    images: float32 [Bi, 3, H, W] in -1..1; picture number k of so many has image k modulo Bi. The
    generator draws the noise of their posterior. Raises `EngineError` where the encoder gives other
    shapes.
    """
    count, _, height, width = images.shape
    epsilon = generator.normal(latent_shape(count, height, width, spec))
    known = scale(sample_posterior(*encode(images, spec, run), epsilon), spec)
    return np.concatenate([known] * (pictures // len(known)))


def read_controls(image: object, request: GenerationRequest) -> NDArray[np.float32]:
    """Control pictures, float32 [Bc, 3, H, W] in -1..1: one for all, one a prompt or one a picture.

    Raises `UsageError` for another number of them, and for what are no pictures.
    """
    images = to_pixels(image, request.height, request.width, "control_image")
    prompts = len(request.text)
    if len(images) not in (1, prompts, request.batch):
        raise UsageError(
            f"There are {len(images)} control images for {prompts} prompts and {request.batch} "
            "pictures. Give one for all, one a prompt or one a picture."
        )
    return images


def control_latents(
    images: NDArray[np.float32],
    pictures: int,
    spec: LatentSpec,
    generator: Generators,
    run: Run,
) -> NDArray[np.float32]:
    """Latents of control pictures, float32 [B, L, C], packed: a draw of its own for each picture.

    Raises `EngineError` where the encoder gives other shapes.
    """
    _, _, height, width = images.shape
    epsilon = generator.normal(latent_shape(pictures, height, width, spec))
    each = pictures // len(images)
    mean, logvar = (np.repeat(x, each, axis=0) for x in encode(images, spec, run))
    return pack(scale(sample_posterior(mean, logvar, epsilon), spec), spec)


def start_noise(
    request: GenerationRequest, spec: LatentSpec, generator: Generators
) -> NDArray[np.float32]:
    """What a picture of noise alone begins with, float32 [B, L, C]: the caller's, or drawn."""
    if request.latents is not None:
        return request.latents.copy()
    shape = latent_shape(request.batch, request.height, request.width, spec)
    return pack(generator.normal(shape), spec)
