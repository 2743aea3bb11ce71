"""Pictures that the caller gives: read from files, and made into what the VAE encoder takes.

As diffusers' `load_image` and `VaeImageProcessor` do it: turned as EXIF says, converted to RGB
without regard to transparency, and resized to the asked size whatever the proportions.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fluxdeploy.arguments import shown
from fluxdeploy.bundle.files import read_whole
from fluxdeploy.errors import FluxDeployError, UsageError

__all__ = ["decode_image", "open_image", "to_pixels"]

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that Pillow decodes by itself: others call programs, or can be documents."""

_MAX_PIXELS = 1 << 26
_MAX_BYTES = 256 << 20
"""Of so many pixels without compression."""

_KINDS = (
    "a PIL image, an array [H, W, 3] or [B, H, W, 3] of uint8 or of floats from 0 to 1, or a list "
    "of these"
)


def open_image(path: Path) -> tuple[Image.Image, str]:
    """The picture in a file, RGB and upright, and the SHA-256 of the file as 64 hex digits.

    Of an animation it is the first frame. Raises `UsageError` for a file that holds no picture, or
    more than 8192 x 8192 pixels, and `FluxDeployError` for one that cannot be read.
    """
    try:
        data = read_whole(path, _MAX_BYTES)
    except OSError as error:
        raise FluxDeployError(
            f"Cannot read the picture {path}: {error.strerror or error}. Name another file."
        ) from error
    picture = decode_image(data, str(path))
    return picture, hashlib.sha256(data).hexdigest()


def decode_image(data: bytes, name: str) -> Image.Image:
    """The picture in the bytes of a file, RGB and upright; `name` is what errors call it.

    Of an animation it is the first frame. Raises `UsageError` for bytes that hold no picture, or
    more than 8192 x 8192 pixels.
    """
    try:
        with warnings.catch_warnings():
            # Of sizes, which are checked here, and of transparency, which is dropped.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                picture = _upright_rgb(image)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    except Image.DecompressionBombError:
        raise UsageError(f"{name}: {_too_large()}") from None
    except MemoryError:
        raise
    except Exception as error:  # on broken files Pillow's decoders raise anything
        raise UsageError(
            f"{name} is not a picture that can be read. Give one of {', '.join(_FORMATS)}."
        ) from error
    return picture


def to_pixels(image: object, height: int, width: int) -> NDArray[np.float32]:
    """Pictures as the VAE encoder takes them: float32 [B, 3, height, width] in -1..1.

    image: a PIL image, an array [H, W, 3] or [B, H, W, 3], or a list of these. PIL images and uint8
    arrays are resized with Lanczos, arrays of floats to the nearest pixel, as in diffusers. Raises
    `UsageError` for anything else.
    """
    items = image if isinstance(image, (list, tuple)) else [image]
    if not items:
        raise UsageError(f"`image` is an empty list. Give {_KINDS}.")
    pictures = np.stack([picture for item in items for picture in _resized(item, height, width)])
    return np.ascontiguousarray(np.float32(2) * pictures.transpose(0, 3, 1, 2) - np.float32(1))


def _resized(item: object, height: int, width: int) -> Sequence[NDArray[np.float32]]:
    """Pictures, float32 [height, width, 3] in 0..1."""
    if isinstance(item, Image.Image):
        return [_lanczos(_decoded(item), height, width)]
    if not isinstance(item, np.ndarray) or item.ndim not in (3, 4) or item.shape[-1] != 3:
        what = f"an array {list(item.shape)}" if isinstance(item, np.ndarray) else shown(item)
        raise UsageError(f"`image` holds {what}. Give {_KINDS}.")
    if item.size == 0:
        raise UsageError("`image` holds an array without pixels.")
    pictures = np.asarray(item if item.ndim == 4 else item[None])
    if pictures.shape[1] * pictures.shape[2] > _MAX_PIXELS:
        raise UsageError(_too_large())
    if pictures.dtype == np.uint8:
        return [_lanczos(Image.fromarray(picture), height, width) for picture in pictures]
    if not np.issubdtype(pictures.dtype, np.floating):
        raise UsageError(f"`image` holds an array of {pictures.dtype}. Give {_KINDS}.")
    # NaN fails as well.
    if not (pictures.min() >= 0 and pictures.max() <= 1):
        raise UsageError("`image` holds an array with values outside 0 to 1. Scale it to that.")
    return list(_nearest(pictures.astype(np.float32), height, width))


def _decoded(image: Image.Image) -> Image.Image:
    """A picture of the caller's, whose file may not have been read yet."""
    try:
        return _upright_rgb(image)
    except (UsageError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"`image` holds a picture that cannot be read: {error}.") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > _MAX_PIXELS:
        raise UsageError(_too_large())
    if not image.width or not image.height:
        raise UsageError("A picture without pixels cannot be resized. Give another one.")
    if image.mode in ("I", "F"):
        raise UsageError(
            f"A picture of Pillow's mode {image.mode!r} has no known range. Convert it to 8 bits."
        )
    upright = _upright(image)
    if upright.mode.startswith("I;16"):
        # `convert` would make all above 255 white; of 16-bit colours Pillow keeps the high byte.
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    rgb: Image.Image = upright.convert("RGB")
    return rgb


def _upright(image: Image.Image) -> Any:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - on broken EXIF Pillow raises anything; viewers ignore it
        return image


def _too_large() -> str:
    return "The picture has more than 8192 x 8192 pixels. Give a smaller one."


def _lanczos(image: Image.Image, height: int, width: int) -> NDArray[np.float32]:
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.float32) / np.float32(255)


def _nearest(pictures: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """As torch's `interpolate`: from pixel floor(i * old / new), in float32."""
    rows, columns = (
        np.minimum(np.arange(new, dtype=np.float32) * np.float32(old / new), old - 1)
        for old, new in zip(pictures.shape[1:3], (height, width), strict=True)
    )
    return pictures[:, rows.astype(np.intp)[:, None], columns.astype(np.intp)]
