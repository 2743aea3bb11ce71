"""Inpainting: the marked part of a picture is drawn again, the rest is held to what it was.

Equal to diffusers' FluxInpaintPipeline, for any text-to-image checkpoint. As in image to image the
picture begins noised; after each step, what is not marked becomes the given picture again, noised
to the level that the step ended at. diffusers draws a third time, for the latents of the picture
without its marked part, which nothing but FLUX.1-Fill reads; this is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import check_integer
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.components import Run
from fluxdeploy.host.input_images import to_masks
from fluxdeploy.host.loop import Blend
from fluxdeploy.host.mask_crop import MaskCrop, crop_to_mask
from fluxdeploy.host.request import GenerationRequest
from fluxdeploy.host.tasks.encoding import check_count, known_latents
from fluxdeploy.host.tasks.image_to_image import ImageToImage, read_images
from fluxdeploy.host.tasks.task import Start
from fluxdeploy.sampling.latents import latent_shape, pack
from fluxdeploy.sampling.noise import Generators
from fluxdeploy.sampling.noising import scale_noise

__all__ = ["Inpainting"]


@dataclass(frozen=True)
class Inpainting(ImageToImage):
    """Image to image where `masks`, bool [Bm, H, W], are true.

    Picture number k of the B has image k modulo Bi and mask k modulo Bm, as in diffusers.
    crop: what the drawn pictures are laid over, with `padding_mask_crop`.
    """

    name: ClassVar[str] = "inpainting"
    chosen_by: ClassVar[tuple[str, ...]] = ("image", "mask_image")
    options: ClassVar[Mapping[str, object]] = {"strength": None, "padding_mask_crop": None}

    masks: NDArray[np.bool_]
    crop: MaskCrop | None

    @classmethod
    def read(
        cls, request: GenerationRequest, manifest: Manifest, arguments: Mapping[str, Any]
    ) -> Inpainting:
        """The task of a request with `image`, `mask_image`, `strength` and `padding_mask_crop`."""
        cls.check_latents(request)
        height, width = request.height, request.width
        crop, padding = None, arguments["padding_mask_crop"]
        if padding is not None:
            padding = check_integer("padding_mask_crop", padding, 0)
            crop = crop_to_mask(arguments["image"], arguments["mask_image"], height, width, padding)
            arguments = {**arguments, "image": crop.image, "mask_image": crop.mask}
        images, strength = read_images(request, manifest, arguments)
        masks = to_masks(arguments["mask_image"], height, width)
        check_count("masks", len(masks), request.batch)
        return cls(request, manifest, images, strength, masks, crop)

    @classmethod
    def check_latents(cls, request: GenerationRequest) -> None:
        """Refuse latents: what is held is noised with the very noise that the picture begins with.

        Raises `UsageError`.
        """
        if request.latents is not None:
            raise UsageError(
                f"`latents` has no place in {cls.name}, whose noise comes from `seed`. Leave out "
                "`latents` or `mask_image`."
            )

    def notices(self) -> tuple[str, ...]:
        """A mask does nothing where no latent is marked."""
        if self._latent_masks().any(axis=(1, 2)).all():
            return ()
        side = self.manifest.latents.spatial_factor
        return (
            "`mask_image` marks nothing that can be redrawn: of the first pixel of each "
            f"{side}x{side}, none is white. Mark more.",
        )

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        """The pictures' latents, noised to the first level that is left, and what holds them."""
        assert self.request.seed is not None
        return self.begin(sigmas, Generators(self.request.seed), run)

    def begin(self, sigmas: NDArray[np.float32], generator: Generators, run: Run) -> Start:
        """As `prepare`, with what is left of a generator."""
        request, spec = self.request, self.manifest.latents
        sigmas = sigmas[-(self.steps + 1) :]
        known = known_latents(self.images, request.batch, spec, generator, run)
        noise = generator.normal(latent_shape(request.batch, request.height, request.width, spec))
        start = pack(scale_noise(known, noise, sigmas[0]), spec)
        return Start(start, sigmas, blend=self._blend(pack(known, spec), pack(noise, spec), sigmas))

    def finish(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        """The whole picture, where only the part around the mask was drawn."""
        return picture if self.crop is None else self.crop.overlay(picture)

    def _latent_masks(self) -> NDArray[np.bool_]:
        """Bool [Bm, h, w]: what the first pixel of each latent says."""
        side = self.manifest.latents.spatial_factor
        return self.masks[:, ::side, ::side]

    def _blend(
        self,
        known: NDArray[np.float32],
        noise: NDArray[np.float32],
        sigmas: NDArray[np.float32],
    ) -> Blend:
        """Puts `known`, noised with `noise`, where nothing is marked; all are [B, L, C], packed."""
        spec = self.manifest.latents
        kept = np.repeat(~self._latent_masks()[:, None], spec.channels, axis=1)
        kept = np.concatenate([kept] * (self.request.batch // len(kept)))
        held = pack(kept.astype(np.float32), spec) != 0
        noised, share = np.empty_like(known), np.empty_like(known)

        def blend(step: int, latents: NDArray[np.float32]) -> None:
            # `scale_noise`, without an array that is new.
            level = sigmas[step + 1]
            np.multiply(noise, level, out=noised)
            np.multiply(known, np.float32(1) - level, out=share)
            np.add(noised, share, out=noised)
            np.copyto(latents, noised, where=held)

        return blend
