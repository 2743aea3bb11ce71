"""Control: a picture is drawn along the edges, or the depths, of another one.

Equal to diffusers' FluxControlPipeline, for checkpoints of FLUX.1 Canny's and Depth's kind: beside
the latents they read those of the control picture. One generator draws the noise of its posterior,
for every picture of the batch, and then the noise that the picture begins with, unless `latents`
are given for it. Edges and depths are found by others: what is given is what the model reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.host.components import Run
from fluxdeploy.host.request import GenerationRequest
from fluxdeploy.host.tasks.encoding import control_latents, read_controls, start_noise
from fluxdeploy.host.tasks.task import Start, Task
from fluxdeploy.sampling.latents import latent_shape
from fluxdeploy.sampling.noise import Generators

__all__ = ["Control"]


@dataclass(frozen=True)
class Control(Task):
    """Pictures drawn after control pictures, float32 [Bc, 3, H, W] in -1..1.

    There is one for all, one for each prompt or one for each picture.
    """

    name: ClassVar[str] = "control"
    chosen_by: ClassVar[tuple[str, ...]] = ("control_image",)
    components: ClassVar[tuple[str, ...]] = ("vae_encoder",)
    draws_more: ClassVar[bool] = True

    images: NDArray[np.float32]

    @classmethod
    def read(
        cls, request: GenerationRequest, manifest: Manifest, arguments: Mapping[str, Any]
    ) -> Control:
        """The task of a request with `control_image`."""
        images = read_controls(arguments["control_image"], request)
        return cls(request, manifest, images)

    def engine_sizes(self) -> Mapping[str, Mapping[str, int]]:
        """The VAE encoder is given one picture at a time."""
        height, width = self.request.height, self.request.width
        _, _, h, w = latent_shape(1, height, width, self.manifest.latents)
        return {"vae_encoder": {"H": height, "W": width, "h": h, "w": w}}

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        """Noise of the seed, and the control pictures' latents beside it."""
        request, spec = self.request, self.manifest.latents
        assert request.seed is not None
        generator = Generators(request.seed)
        control = control_latents(self.images, request.batch, spec, generator, run)
        return Start(start_noise(request, spec, generator), sigmas, channels=control)
