"""The sizes of pictures that a bundle draws."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL.Image import Image

from fluxdeploy.bundle.manifest import Defaults, Manifest
from fluxdeploy.serve.images_api.errors import ApiError

__all__ = ["Sides", "Sizes"]


@dataclass(frozen=True)
class Sides:
    """From how many pixels to how many a side of a picture may have."""

    min: int
    max: int


@dataclass(frozen=True)
class Sizes:
    """What any of a bundle's decoders takes; both sides are multiples of `multiple`."""

    widths: Sides
    heights: Sides
    multiple: int

    @classmethod
    def of(cls, manifest: Manifest) -> Sizes:
        """The sizes of a bundle."""
        return cls(_sides(manifest, "W"), _sides(manifest, "H"), manifest.latents.token_side)

    def check(self, width: int, height: int) -> None:
        """Raise `ApiError` for a size that is none of these, with those that are."""
        for side, allowed in ((width, self.widths), (height, self.heights)):
            if side % self.multiple or not allowed.min <= side <= allowed.max:
                raise ApiError(
                    400,
                    f"The size {width}x{height} is out of range: widths go from {self.widths.min} "
                    f"to {self.widths.max} and heights from {self.heights.min} to "
                    f"{self.heights.max}, both in multiples of {self.multiple}.",
                    "size",
                )

    def default(self, defaults: Defaults, image: Image | None) -> tuple[int, int]:
        """Width and height: the bundle's, in the proportions of the image where there is one."""
        if image is None:
            return defaults.width, defaults.height
        scale = math.sqrt(defaults.width * defaults.height / (image.width * image.height))
        return (
            self._fitted(image.width * scale, self.widths),
            self._fitted(image.height * scale, self.heights),
        )

    def _fitted(self, side: float, allowed: Sides) -> int:
        wanted = max(round(side / self.multiple), 1) * self.multiple
        return min(max(wanted, allowed.min), allowed.max)


def _sides(manifest: Manifest, axis: str) -> Sides:
    ranges = [
        engine.dimensions[axis]
        for engine in manifest.components["vae_decoder"].engines
        if axis in engine.dimensions
    ]
    return Sides(min(each.min for each in ranges), max(each.max for each in ranges))
