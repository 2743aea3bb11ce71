"""Outpainting is inpainting on a larger canvas, where the margins are what is redrawn."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fluxdeploy.arguments import check_integer, shown
from fluxdeploy.errors import UsageError
from fluxdeploy.host.input_images import MAX_PIXELS, upright_picture

__all__ = ["outpaint_canvas"]


def outpaint_canvas(
    image: Image.Image, left: int, top: int, right: int, bottom: int, multiple: int = 16
) -> tuple[Image.Image, Image.Image]:
    """A canvas with `image` and margins around it, and the mask to draw these with.

    left, top, right, bottom: pixels to add. Where the canvas has no sides that are multiples of
    `multiple`, as pictures have, a few pixels more are added on the right and at the bottom. Until
    they are drawn, margins repeat the image's edge. The canvas is RGB, the mask "L": 255 in the
    margins, else 0; a call takes them as `image` and `mask_image`, with the canvas's height and
    width. Raises `UsageError` for margins that are none, and for more than 8192 x 8192 pixels.
    """
    if not isinstance(image, Image.Image):
        raise UsageError(f"A canvas is made around a PIL image, not {shown(image)}.")
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    left, top, right, bottom = (check_integer(name, sides[name], 0) for name in sides)
    if not (left or top or right or bottom):
        raise UsageError("No pixels are to be added. Give at least one side some.")
    known = upright_picture(image)
    width, height = (
        _up(before + size + after, multiple)
        for before, size, after in ((left, known.width, right), (top, known.height, bottom))
    )
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"The canvas would have {shown(width)}x{shown(height)} pixels; at most 8192 x 8192 are "
            "possible. Add fewer."
        )
    margins = (
        (top, height - top - known.height),
        (left, width - left - known.width),
    )
    canvas = np.pad(np.asarray(known), (*margins, (0, 0)), mode="edge")
    mask = np.pad(np.zeros((known.height, known.width), np.uint8), margins, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(mask)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
