"""Fill: the marked part of a picture is drawn by a transformer that sees the rest of it.

Equal to diffusers' FluxFillPipeline, for checkpoints of FLUX.1 Fill's kind: beside the latents
they read those of the picture without its marked part, and the mask. Nothing is held to what it
was. One generator draws the noise of the picture's posterior, the noise that the picture begins
with, and the noise of the masked picture's posterior; with `latents` the last of these alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.host.components import Run
from fluxdeploy.host.request import GenerationRequest
from fluxdeploy.host.tasks.encoding import known_latents, start_noise
from fluxdeploy.host.tasks.inpainting import Inpainting
from fluxdeploy.host.tasks.task import Start
from fluxdeploy.sampling.latents import latent_shape, pack
from fluxdeploy.sampling.masks import hide, mask_channels
from fluxdeploy.sampling.noise import Generators
from fluxdeploy.sampling.noising import scale_noise

__all__ = ["Fill"]


@dataclass(frozen=True)
class Fill(Inpainting):
    """What is drawn where `masks`, bool [Bm, H, W], are true, after the rest of `images`."""

    name: ClassVar[str] = "fill"
    draws_more: ClassVar[bool] = True

    @classmethod
    def check_latents(cls, request: GenerationRequest) -> None:
        """Latents are what the picture begins with: nothing is held to the noise in them."""

    def notices(self) -> tuple[str, ...]:
        """A mask does nothing where no pixel is marked."""
        if self.masks.any(axis=(1, 2)).all():
            return ()
        return ("`mask_image` marks nothing that is to be drawn: no pixel is white. Mark more.",)

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        """The pictures' latents, noised to the first level that is left, and what stands beside."""
        request, spec = self.request, self.manifest.latents
        sigmas = sigmas[-(self.steps + 1) :]
        assert request.seed is not None
        generator = Generators(request.seed)
        if request.latents is None and sigmas[0] == 1:
            # Nothing is left of the picture; its draw comes before the others all the same.
            _, *shape = latent_shape(1, request.height, request.width, spec)
            generator.normal((len(self.images), *shape))
        if request.latents is not None or sigmas[0] == 1:
            start = start_noise(request, spec, generator)
        else:
            known = known_latents(self.images, request.batch, spec, generator, run)
            start = pack(scale_noise(known, generator.normal(known.shape), sigmas[0]), spec)
        return Start(start, sigmas, channels=self._channels(generator, run))

    def _channels(self, generator: Generators, run: Run) -> NDArray[np.float32]:
        """The pictures without what is marked, and the masks: float32 [B, L, C']."""
        batch, spec = self.request.batch, self.manifest.latents
        # As many as there are pairs of an image and a mask.
        count = math.lcm(len(self.images), len(self.masks))
        images, masks = (
            np.concatenate([each] * (count // len(each))) for each in (self.images, self.masks)
        )
        hidden = known_latents(hide(images, masks), batch, spec, generator, run)
        marks = mask_channels(self.masks, spec)
        marks = np.concatenate([marks] * (batch // len(marks)))
        return np.concatenate([pack(hidden, spec), marks], axis=2)
