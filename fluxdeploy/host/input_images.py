"""Pictures and masks that the caller gives: read from files, and made into what a task takes.

As diffusers' `load_image` and `VaeImageProcessor` do it: turned as EXIF says, converted to RGB
without regard to transparency, and resized to the asked size whatever the proportions.

A mask says what is redrawn. There are two kinds in the world, told apart by transparency: where a
mask has an alpha channel, or a colour that counts as transparent, and not all of it is opaque, what
is transparent is redrawn, as OpenAI's images API has it; else what is white, as in diffusers.
"""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fluxdeploy.arguments import shown
from fluxdeploy.bundle.files import read_whole
from fluxdeploy.errors import FluxDeployError, UsageError

__all__ = [
    "MAX_PIXELS",
    "decode_image",
    "decode_mask",
    "open_image",
    "open_mask",
    "picture_size",
    "to_masks",
    "to_pictures",
    "to_pixels",
    "upright_mask",
    "upright_picture",
]

_T = TypeVar("_T", np.float32, np.bool_)

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that Pillow decodes by itself: others call programs, or can be documents."""

MAX_PIXELS = 1 << 26
"""Of a picture that is given: 8192 x 8192."""

_DECODING = threading.Lock()
"""One at a time: a picture takes much memory, and the filters of warnings belong to the process."""

_MAX_BYTES = 256 << 20
"""Of so many pixels without compression."""

_KINDS = (
    "a PIL image, an array [H, W, 3] or [B, H, W, 3] of uint8 or of floats from 0 to 1, or a list "
    "of these"
)

_MASK_KINDS = (
    "a PIL image, an array [H, W] or [B, H, W] of bool, of uint8 or of floats from 0 to 1, or a "
    "list of these"
)


def open_image(path: Path) -> tuple[Image.Image, str]:
    """The picture in a file, RGB and upright, and the SHA-256 of the file as 64 hex digits.

    Of an animation it is the first frame. Raises `UsageError` for a file that holds no picture, or
    more than 8192 x 8192 pixels, and `FluxDeployError` for one that cannot be read.
    """
    return _open(path, _upright_rgb)


def open_mask(path: Path) -> tuple[Image.Image, str]:
    """The mask in a file, upright and white where it is to be redrawn, and the file's SHA-256.

    Reads and raises as `open_image`.
    """
    return _open(path, _mask_of_file)


def decode_image(data: bytes, name: str) -> Image.Image:
    """The picture in a file's bytes, as `open_image` gives it; errors call it `name`.

    Raises `UsageError`.
    """
    return _decode(data, name, _upright_rgb)


def decode_mask(data: bytes, name: str) -> Image.Image:
    """The mask in a file's bytes, as `open_mask` gives it; errors call it `name`.

    Raises `UsageError`.
    """
    return _decode(data, name, _mask_of_file)


def _open(path: Path, read: Callable[[Image.Image], Image.Image]) -> tuple[Image.Image, str]:
    try:
        data = read_whole(path, _MAX_BYTES)
    except OSError as error:
        raise FluxDeployError(
            f"Cannot read the picture {path}: {error.strerror or error}. Name another file."
        ) from error
    return _decode(data, str(path), read), hashlib.sha256(data).hexdigest()


def _decode(data: bytes, name: str, read: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with _DECODING, warnings.catch_warnings():
            # Of sizes, which are checked here, and of transparency, which is dropped.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return read(image)
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


def to_pixels(image: object, height: int, width: int, name: str = "image") -> NDArray[np.float32]:
    """Pictures as the VAE encoder takes them: float32 [B, 3, height, width] in -1..1.

    image: a PIL image, an array [H, W, 3] or [B, H, W, 3], or a list of these. PIL images and uint8
    arrays are resized with Lanczos, arrays of floats to the nearest pixel, as in diffusers. Raises
    `UsageError`, which calls it `name`, for anything else.
    """
    items = image if isinstance(image, (list, tuple)) else [image]
    if not items:
        raise UsageError(f"`{name}` is an empty list. Give {_KINDS}.")
    pictures = np.stack(
        [picture for item in items for picture in _resized(item, height, width, name)]
    )
    return np.ascontiguousarray(np.float32(2) * pictures.transpose(0, 3, 1, 2) - np.float32(1))


def to_pictures(image: object, name: str = "image") -> list[Image.Image]:
    """Pictures for an image encoder, in RGB and of their own sizes.

    image: of the kinds of `to_pixels`. What is transparent shows white, as in transformers. Raises
    `UsageError`, which calls it `name`, for anything else.
    """
    items = image if isinstance(image, (list, tuple)) else [image]
    if not items:
        raise UsageError(f"`{name}` is an empty list. Give {_KINDS}.")
    return [picture for item in items for picture in _in_rgb(item, name)]


def _in_rgb(item: object, name: str) -> list[Image.Image]:
    if isinstance(item, Image.Image):
        return [_decoded(item, name, _over_white)]
    pictures = _numbers(item, name)
    if pictures.dtype != np.uint8:
        pictures = np.rint(pictures * 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in pictures]


def _over_white(image: Image.Image) -> Image.Image:
    upright = _checked_upright(image)
    alpha, rgb = _alpha(upright), _in_8_bits(upright).convert("RGB")
    if alpha is None:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def picture_size(image: object) -> tuple[int, int]:
    """Height and width of the first of the pictures that `to_pixels` takes, in pixels.

    Raises `UsageError` for anything else.
    """
    item = image[0] if isinstance(image, (list, tuple)) and image else image
    if isinstance(item, Image.Image):
        upright = _decoded(item, "image", _checked_upright)
        return upright.height, upright.width
    height, width = _pictures(item, "image").shape[1:3]
    return height, width


def _resized(item: object, height: int, width: int, name: str) -> Sequence[NDArray[np.float32]]:
    """Pictures, float32 [height, width, 3] in 0..1."""
    if isinstance(item, Image.Image):
        return [_lanczos(upright_picture(item, name), height, width)]
    pictures = _numbers(item, name)
    if pictures.dtype == np.uint8:
        return [_lanczos(Image.fromarray(picture), height, width) for picture in pictures]
    return list(_nearest(pictures.astype(np.float32), height, width))


def _numbers(item: object, name: str) -> NDArray[Any]:
    """An array of pictures, [B, H, W, 3] of uint8 or of floats in 0..1."""
    pictures = _pictures(item, name)
    if pictures.dtype == np.uint8:
        return pictures
    if not np.issubdtype(pictures.dtype, np.floating):
        raise UsageError(f"`{name}` holds an array of {pictures.dtype}. Give {_KINDS}.")
    # NaN fails as well.
    if not (pictures.min() >= 0 and pictures.max() <= 1):
        raise UsageError(f"`{name}` holds an array with values outside 0 to 1. Scale it to that.")
    return pictures


def _pictures(item: object, name: str) -> NDArray[Any]:
    """An array of pictures, [B, H, W, 3]."""
    if not isinstance(item, np.ndarray) or item.ndim not in (3, 4) or item.shape[-1] != 3:
        what = f"an array {list(item.shape)}" if isinstance(item, np.ndarray) else shown(item)
        raise UsageError(f"`{name}` holds {what}. Give {_KINDS}.")
    if item.size == 0:
        raise UsageError(f"`{name}` holds an array without pixels.")
    pictures = np.asarray(item if item.ndim == 4 else item[None])
    _check_pixels(*pictures.shape[1:3])
    return pictures


def to_masks(mask: object, height: int, width: int) -> NDArray[np.bool_]:
    """Masks, bool [B, height, width], true where the picture is redrawn.

    mask: a PIL image, an array [H, W], [H, W, 1], [B, H, W] or [B, H, W, 1], or a list of these.
    PIL images are resized with Lanczos, or to the nearest pixel in their modes "1" and "P", and
    count from 128 of 255; so do uint8 arrays [H, W, 3] and [H, W, 4]. Other arrays are resized to
    the nearest pixel: floats count from 0.5, uint8 from 128, or from 1 where none is above. Raises
    `UsageError` for anything else.
    """
    items = mask if isinstance(mask, (list, tuple)) else [mask]
    if not items:
        raise UsageError(f"`mask_image` is an empty list. Give {_MASK_KINDS}.")
    return np.stack([each for item in items for each in _marked(item, height, width)])


def _marked(item: object, height: int, width: int) -> Sequence[NDArray[np.bool_]]:
    """Masks, bool [height, width]."""
    if isinstance(item, np.ndarray) and item.size and _has_colours(item):
        _check_pixels(*item.shape[:2])
        item = Image.fromarray(item)
    if isinstance(item, Image.Image):
        resized = upright_mask(item).resize((width, height), Image.Resampling.LANCZOS)
        return [np.asarray(resized.convert("L")) >= 128]
    if isinstance(item, np.ndarray) and item.ndim in (3, 4) and item.shape[-1] == 1:
        item = item[..., 0]
    if not isinstance(item, np.ndarray) or item.ndim not in (2, 3):
        what = f"an array {list(item.shape)}" if isinstance(item, np.ndarray) else shown(item)
        raise UsageError(f"`mask_image` holds {what}. Give {_MASK_KINDS}.")
    if item.size == 0:
        raise UsageError("`mask_image` holds an array without pixels.")
    masks = np.asarray(item if item.ndim == 3 else item[None])
    _check_pixels(*masks.shape[1:])
    return list(_nearest(_binary(masks), height, width))


def _has_colours(item: NDArray[Any]) -> bool:
    return item.ndim == 3 and item.shape[-1] in (3, 4) and item.dtype == np.uint8


def _binary(masks: NDArray[Any]) -> NDArray[np.bool_]:
    if masks.dtype == np.bool_:
        return masks
    if masks.dtype == np.uint8:
        # Of 0 and 1, as who segments pictures has them.
        return np.asarray(masks >= (128 if masks.max() > 1 else 1))
    if not np.issubdtype(masks.dtype, np.floating):
        raise UsageError(f"`mask_image` holds an array of {masks.dtype}. Give {_MASK_KINDS}.")
    # NaN fails as well.
    if not (masks.min() >= 0 and masks.max() <= 1):
        raise UsageError(
            "`mask_image` holds an array with values outside 0 to 1. Scale it to that."
        )
    return np.asarray(masks >= 0.5)


def upright_picture(image: Image.Image, name: str = "image") -> Image.Image:
    """A picture of the caller's in RGB, turned as EXIF says; its file may not be read yet.

    Raises `UsageError`, which calls it `name`, where it cannot be, and for more than 8192 x 8192
    pixels.
    """
    return _decoded(image, name, _upright_rgb)


def upright_mask(image: Image.Image) -> Image.Image:
    """A mask of the caller's, turned as EXIF says and white where it is to be redrawn.

    Of the modes "1", "L", "P" and "RGB". Raises as `upright_picture`.
    """
    return _decoded(image, "mask_image", _mask)


def _decoded(
    image: Image.Image, name: str, read: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    try:
        return read(image)
    except (UsageError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"`{name}` holds a picture that cannot be read: {error}.") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    rgb: Image.Image = _in_8_bits(_checked_upright(image)).convert("RGB")
    return rgb


def _mask_of_file(image: Image.Image) -> Image.Image:
    """As diffusers' `load_image`, which makes all RGB before anything is resized."""
    return _mask(image).convert("RGB")


def _mask(image: Image.Image) -> Image.Image:
    upright = _checked_upright(image)
    alpha = _alpha(upright)
    if alpha is not None:
        return ImageOps.invert(alpha)
    grey = _in_8_bits(upright)
    # What diffusers resizes in its own mode, before it is grey.
    return grey if grey.mode in ("1", "L", "P", "RGB") else grey.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is, in mode "L"; None where all of them are, wholly."""
    if image.mode.startswith("I;16"):
        key = image.info.get("transparency")
        opaque = np.asarray(image) != (-1 if key is None else key)
        alpha = Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))
    elif image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
    else:
        return None
    return None if alpha.getextrema()[0] == 255 else alpha


def _checked_upright(image: Image.Image) -> Image.Image:
    """A picture of a kind and size that is taken, turned as EXIF says."""
    _check_pixels(image.height, image.width)
    if not image.width or not image.height:
        raise UsageError("A picture without pixels cannot be resized. Give another one.")
    if image.mode in ("I", "F"):
        raise UsageError(
            f"A picture of Pillow's mode {image.mode!r} has no known range. Convert it to 8 bits."
        )
    upright: Image.Image = _upright(image)
    return upright


def _in_8_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I;16"):
        return image
    # `convert` would make all above 255 white; of 16-bit colours Pillow keeps the high byte.
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise UsageError(_too_large())


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


def _nearest(pictures: NDArray[_T], height: int, width: int) -> NDArray[_T]:
    """[B, H, W, ...] as torch's `interpolate`: from pixel floor(i * old / new), in float32."""
    rows, columns = (
        np.minimum(np.arange(new, dtype=np.float32) * np.float32(old / new), old - 1)
        for old, new in zip(pictures.shape[1:3], (height, width), strict=True)
    )
    return pictures[:, rows.astype(np.intp)[:, None], columns.astype(np.intp)]
