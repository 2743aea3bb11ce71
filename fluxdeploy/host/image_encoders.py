"""Pictures as image encoders read them: resized, cropped and normed by what the manifest says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fluxdeploy.bundle.pixels import FILTERS, PixelSpec
from fluxdeploy.errors import UsageError
from fluxdeploy.host.input_images import MAX_PIXELS

__all__ = ["to_pixel_values"]


def to_pixel_values(pictures: Sequence[Image.Image], spec: PixelSpec) -> NDArray[np.float32]:
    """Pictures in RGB, of any sizes, as float32 [n, 3, height, width] of `spec.size`.

    As SiglipImageProcessor and CLIPImageProcessor of transformers do it. Raises `UsageError` for a
    picture that is so narrow that resizing its shorter side makes it too large.
    """
    height, width = spec.size
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    made = np.empty((len(pictures), 3, height, width), np.float32)
    for picture, into in zip(pictures, made, strict=True):
        resized = _resized(picture, spec)
        top, left = (resized.height - height) // 2, (resized.width - width) // 2
        pixels = np.asarray(resized.crop((left, top, left + width, top + height)), np.float32)
        pixels = (pixels * np.float32(spec.scale) - mean) / std
        into[...] = pixels.transpose(2, 0, 1)
    return made


def _resized(picture: Image.Image, spec: PixelSpec) -> Image.Image:
    if len(spec.resize) == 2:
        height, width = spec.resize
    else:
        # The longer side is rounded down, as transformers has it.
        short, (side,) = min(picture.size), spec.resize
        width, height = (side if each == short else side * each // short for each in picture.size)
    if height * width > MAX_PIXELS:
        raise UsageError(
            f"A picture of {picture.width}x{picture.height} pixels is too narrow for an image "
            "encoder. Crop it."
        )
    resample = Image.Resampling(FILTERS.index(spec.filter))
    return picture.resize((width, height), resample)
