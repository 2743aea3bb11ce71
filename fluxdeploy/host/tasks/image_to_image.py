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
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.components import Run
from fluxdeploy.host.input_images import to_pixels
from fluxdeploy.host.request import GenerationRequest
from fluxdeploy.host.tasks.encoding import check_count, known_latents
from fluxdeploy.host.tasks.task import Start, Task
from fluxdeploy.sampling.latents import latent_shape, pack
from fluxdeploy.sampling.noise import Generators
from fluxdeploy.sampling.noising import first_step, scale_noise

__all__ = ["ImageToImage", "read_images"]


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
        if self.request.latents is not None:
            return Start(self.request.latents.copy(), sigmas[-(self.steps + 1) :])
        assert self.request.seed is not None  # without latents there is one
        return self.begin(sigmas, Generators(self.request.seed), run)

    def begin(self, sigmas: NDArray[np.float32], generator: Generators, run: Run) -> Start:
        """As `prepare`, with what is left of a generator, and without the caller's latents."""
        request, spec = self.request, self.manifest.latents
        sigmas = sigmas[-(self.steps + 1) :]
        known = known_latents(self.images, request.batch, spec, generator, run)
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
    check_count("images", len(images), request.batch)
    steps = request.num_inference_steps
    if first_step(steps, strength) == steps:
        raise UsageError(
            f"At strength {strength:g} none of {steps} steps is left. "
            "Raise `strength` or `num_inference_steps`."
        )
    return images, strength
