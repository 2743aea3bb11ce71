"""The part of a picture around its mask: drawn in full size, and laid over the picture again.

As `padding_mask_crop` of diffusers' pipelines. A small mark in a large picture is then drawn with
all the pixels that the model makes, and everything else stays as it was, pixel by pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fluxdeploy.arguments import shown
from fluxdeploy.errors import UsageError
from fluxdeploy.host.input_images import upright_mask, upright_picture

__all__ = ["MaskCrop", "crop_region", "crop_to_mask"]

Box = tuple[int, int, int, int]
"""Left, top, right and bottom; right and bottom are outside."""


@dataclass(frozen=True)
class MaskCrop:
    """What is drawn, and what it is laid over.

    image, mask: `width` x `height` pixels, as a task draws them. original: the whole picture.
    opaque: mode "L", of its size: 255 where the original stays, 0 where it is redrawn.
    """

    image: Image.Image
    mask: Image.Image
    original: Image.Image
    opaque: Image.Image
    box: Box

    def overlay(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        """The original with a drawn picture in its place, float32 [H, W, 3] in 0..1, of 8 bits."""
        left, top, right, bottom = self.box
        drawn = Image.fromarray(np.rint(picture * 255).astype(np.uint8))
        whole = Image.new("RGB", self.original.size)
        whole.paste(_covering(drawn, right - left, bottom - top), (left, top))
        whole = whole.convert("RGBA")
        # Premultiplied, as diffusers does it: the rounding is part of the result.
        kept = Image.new("RGBa", self.original.size)
        kept.paste(self.original.convert("RGBA").convert("RGBa"), mask=self.opaque)
        whole.alpha_composite(kept.convert("RGBA"))
        return np.asarray(whole.convert("RGB"), np.float32) / np.float32(255)


def crop_to_mask(image: object, mask: object, height: int, width: int, padding: int) -> MaskCrop:
    """The part of a picture around its mask, with `padding` pixels more on each side.

    Raises `UsageError` unless image and mask are PIL images of one size, with something to redraw.
    """
    for name, value in (("image", image), ("mask_image", mask)):
        if not isinstance(value, Image.Image):
            raise UsageError(
                f"With `padding_mask_crop`, `{name}` must be one PIL image, not {shown(value)}."
            )
    assert isinstance(image, Image.Image)
    assert isinstance(mask, Image.Image)
    original, marked = upright_picture(image), upright_mask(mask)
    if original.size != marked.size:
        raise UsageError(
            f"`image` has {original.width}x{original.height} pixels and `mask_image` "
            f"{marked.width}x{marked.height}. With `padding_mask_crop` they must have one size."
        )
    grey = marked.convert("L")
    box = crop_region(np.asarray(grey) > 0, height, width, padding)
    return MaskCrop(
        _within(original.crop(box), width, height),
        _within(marked.crop(box), width, height),
        original,
        ImageOps.invert(grey),
        box,
    )


def crop_region(marked: NDArray[np.bool_], height: int, width: int, padding: int) -> Box:
    """The smallest box around all that is marked, padded, and grown towards width / height.

    marked: bool [rows, columns]. The box stays inside, and so can keep other proportions. Raises
    `UsageError` where nothing is marked.
    """
    rows, columns = (np.flatnonzero(marked.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        raise UsageError(
            "`mask_image` marks nothing to crop to. Make white, or transparent, what is to be "
            "redrawn."
        )
    top, bottom = _padded(rows, padding, marked.shape[0])
    left, right = _padded(columns, padding, marked.shape[1])
    wanted = width / height
    if (right - left) / (bottom - top) > wanted:
        missing = int((right - left) / wanted - (bottom - top))
        top, bottom = _grown(top, bottom, missing, marked.shape[0])
    else:
        missing = int((bottom - top) * wanted - (right - left))
        left, right = _grown(left, right, missing, marked.shape[1])
    return left, top, right, bottom


def _padded(marked: NDArray[np.intp], padding: int, size: int) -> tuple[int, int]:
    return max(int(marked[0]) - padding, 0), min(int(marked[-1]) + 1 + padding, size)


def _grown(first: int, end: int, missing: int, size: int) -> tuple[int, int]:
    """`missing` more, half on each side; what does not fit there goes to the other side."""
    first -= missing // 2
    end += missing - missing // 2
    back = max(end - size, 0)
    first, end = first - back, end - back
    forth = max(-first, 0)
    return first + forth, min(end + forth, size)


def _within(image: Image.Image, width: int, height: int) -> Image.Image:
    """An image resized to fit inside width x height, in the middle, RGB.

    What stays free is made from the nearest two rows or columns, as diffusers' mode "fill" does.
    """
    wide = width / height < image.width / image.height
    across = width if wide else max(1, image.width * height // image.height)
    down = max(1, image.height * width // image.width) if wide else height
    resized = image.resize((across, down), Image.Resampling.LANCZOS)
    left, top = width // 2 - across // 2, height // 2 - down // 2
    filled = Image.new("RGB", (width, height))
    filled.paste(resized, (left, top))
    if wide and top:
        for edge, start in ((0, 0), (down, top + down)):
            filled.paste(resized.resize((width, top), box=(0, edge, width, edge)), (0, start))
    elif not wide and left:
        for edge, start in ((0, 0), (across, left + across)):
            filled.paste(resized.resize((left, height), box=(edge, 0, edge, height)), (start, 0))
    return filled


def _covering(image: Image.Image, width: int, height: int) -> Image.Image:
    """An image resized to cover width x height; what is more on two sides is cut off."""
    wide = width / height > image.width / image.height
    across = width if wide else image.width * height // image.height
    down = image.height * width // image.width if wide else height
    resized = image.resize((across, down), Image.Resampling.LANCZOS)
    covering = Image.new("RGB", (width, height))
    covering.paste(resized, (width // 2 - across // 2, height // 2 - down // 2))
    return covering
