"""Text to image: the whole schedule, from noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.host.components import Run
from fluxdeploy.host.request import GenerationRequest
from fluxdeploy.host.tasks.task import Start, Task
from fluxdeploy.sampling.latents import latent_shape, pack
from fluxdeploy.sampling.noise import Generators

__all__ = ["TextToImage"]


@dataclass(frozen=True)
class TextToImage(Task):
    """A picture of a prompt alone."""

    name: ClassVar[str] = "text to image"

    @classmethod
    def read(
        cls, request: GenerationRequest, manifest: Manifest, arguments: Mapping[str, Any]
    ) -> TextToImage:
        """The task of a request; it has no arguments of its own."""
        return cls(request, manifest)

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        """Noise of the seed, or the caller's latents."""
        request, spec = self.request, self.manifest.latents
        if request.latents is not None:
            return Start(request.latents.copy(), sigmas)
        assert request.seed is not None  # without latents there is one
        shape = latent_shape(request.batch, request.height, request.width, spec)
        return Start(pack(Generators(request.seed).normal(shape), spec), sigmas)
