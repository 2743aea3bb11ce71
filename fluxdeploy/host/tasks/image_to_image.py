"""Image to image: from a noised picture through the rest of the schedule.

Equal to diffusers' FluxImg2ImgPipeline, after SDEdit (arXiv 2108.01073). One generator draws the
noise of the encoder's posterior first, and then the noise that the picture is mixed with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import check_number
from fluxdeploy.bundle.manifest import LatentSpec, Manifest
from fluxdeploy.errors import EngineError, UsageError
from fluxdeploy.host.components import Run
from fluxdeploy.host.input_images import to_pixels
from fluxdeploy.host.request import GenerationRequest
from fluxdeploy.host.tasks.task import Start, Task
from fluxdeploy.sampling.latents import latent_shape, pack, sample_posterior, scale
from fluxdeploy.sampling.noise import Generators
from fluxdeploy.sampling.noising import first_step, scale_noise

__all__ = ["ImageToImage", "known_latents", "read_images"]


@dataclass(frozen=True)
class ImageToImage(Task):
    """Pictures made from pictures: float32 [Bi, 3, H, W] in -1..1.

    Picture number k of the B begins with picture k modulo Bi, as in diffusers.
    """

    name: ClassVar[str] = "image to image"
    chosen_by: ClassVar[tuple[str, ...]] = ("image",)
    options: ClassVar[Mapping[str, object]] = {"strength": None}
    components: ClassVar[tuple[str, ...]] = ("vae_encoder",)

    images: NDArray[np.float32]
    strength: float

    @classmethod
    def read(
        cls, request: GenerationRequest, manifest: Manifest, arguments: Mapping[str, Any]
    ) -> ImageToImage:
        """The task of a request with `image` and `strength`."""
        return cls(request, manifest, *read_images(request, manifest, arguments))

    @property
    def steps(self) -> int:
        """The steps after the one that the noised picture stands for."""
        steps = self.request.num_inference_steps
        return steps - first_step(steps, self.strength)

    def engine_sizes(self) -> Mapping[str, Mapping[str, int]]:
        """The VAE encoder is given one picture at a time."""
        _, _, height, width = self.images.shape
        _, _, h, w = latent_shape(1, height, width, self.manifest.latents)
        return {"vae_encoder": {"H": height, "W": width, "h": h, "w": w}}

    def notices(self) -> tuple[str, ...]:
        """The picture does nothing beside latents, nor where all of it becomes noise."""
        if self.request.latents is not None:
            return ("`image` does nothing beside `latents`, which are taken for the noised image.",)
        if self.steps == self.request.num_inference_steps:
            return (
                f"`image` does nothing: at strength {self.strength:g} all of the "
                f"{self.steps} steps are made, from noise alone. Lower `strength`, or raise "
                "`num_inference_steps`.",
            )
        return ()

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        """The pictures' latents, noised to the first level that is left."""
        request, spec = self.request, self.manifest.latents
        sigmas = sigmas[-(self.steps + 1) :]
        if request.latents is not None:
            return Start(request.latents.copy(), sigmas)
        assert request.seed is not None  # without latents there is one
        generator = Generators(request.seed)
        known = known_latents(self.images, request, spec, generator, run)
        noise = generator.normal(latent_shape(request.batch, request.height, request.width, spec))
        return Start(pack(scale_noise(known, noise, sigmas[0]), spec), sigmas)


def read_images(
    request: GenerationRequest, manifest: Manifest, arguments: Mapping[str, Any]
) -> tuple[NDArray[np.float32], float]:
    """`image` as the VAE encoder takes it, and `strength`, of a task's arguments.

    Raises `UsageError` for a value that cannot be.
    """
    given = arguments["strength"]
    strength = manifest.defaults.strength if given is None else given
    strength = check_number("strength", strength, 0, 1)
    images = to_pixels(arguments["image"], request.height, request.width)
    if request.batch % len(images) != 0:
        raise UsageError(
            f"There are {len(images)} images for {request.batch} pictures. Give one for all, "
            "or as many as divide that number."
        )
    steps = request.num_inference_steps
    if first_step(steps, strength) == steps:
        raise UsageError(
            f"At strength {strength:g} none of {steps} steps is left. "
            "Raise `strength` or `num_inference_steps`."
        )
    return images, strength


def known_latents(
    images: NDArray[np.float32],
    request: GenerationRequest,
    spec: LatentSpec,
    generator: Generators,
    run: Run,
) -> NDArray[np.float32]:
    """The latents of the pictures of a call, float32 [B, C, h, w], at the transformer's scale.

    images: float32 [Bi, 3, H, W]. The generator draws the noise of their posterior. Raises
    `EngineError` where the encoder gives other shapes.
    """
    epsilon = generator.normal(latent_shape(len(images), request.height, request.width, spec))
    encoded = [run("vae_encoder", {"images": image[None]}) for image in images]
    mean, logvar = (np.concatenate([each[n] for each in encoded]) for n in ("mean", "logvar"))
    if not mean.shape == logvar.shape == epsilon.shape:
        raise EngineError(
            f"The vae_encoder gave {list(mean.shape)} and {list(logvar.shape)} where latents "
            f"are {list(epsilon.shape)}. Build the bundle again with `fluxdeploy build`."
        )
    known = scale(sample_posterior(mean, logvar, epsilon), spec)
    return np.concatenate([known] * (request.batch // len(known)))
