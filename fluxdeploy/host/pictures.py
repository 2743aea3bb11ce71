"""Picture files: PNGs that carry how they were made, written whole or not at all."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.errors import FluxDeployError, UsageError
from fluxdeploy.host.partial_files import replacing_picture
from fluxdeploy.host.png_text import read_text

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

__all__ = [
    "PictureMetadata",
    "check_picture_path",
    "encode_picture",
    "picture_paths",
    "read_metadata",
    "save_picture",
    "to_pil",
    "write_file",
    "write_png",
]

_N = TypeVar("_N", int, float)
_MAX_DIGITS = 32

_LATER_TEXTS = (
    "control_sha256",
    "control",
    "auto_resize",
    "control_mode",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
    "ip_adapter_sha256",
    "negative_ip_adapter_sha256",
    "ip_adapter_scale",
    "redux_sha256",
    "prompt_embeds_scale",
    "pooled_prompt_embeds_scale",
)


@dataclass(frozen=True)
class PictureMetadata:
    """How a picture was made: enough to make it again with the same bundle.

    `prompt_2` and `negative_prompt_2` are what T5 read, where that was something else than the
    prompt. `index` tells the pictures of one seed apart. `height` and `width` are what
    was asked for; with `padding_mask_crop` the picture has the image's own size. `sampler` is None
    where it is Euler's; `skip` is "auto", or steps with commas, or None. `strength`, the
    SHA-256 of the files and what follows them are those of tasks that take them, else None;
    `outpaint` has the pixels that were added on the left, top, right and bottom. `loras` has name,
    strength and SHA-256 of each LoRA, with commas, and `image_sha256` those of several pictures.
    `control` is the filter that made the control image of the file that is named; `auto_resize` is
    "no" where references were not resized. Of ControlNets, all numbers and `control_sha256` have
    commas between what each of several was given; so have those of a Redux between its pictures',
    and `ip_adapter_scale` between blocks'. Each field is a text chunk of the PNG under its own
    name; a field that is None has no chunk.
    """

    prompt: str
    prompt_2: str | None
    negative_prompt: str | None
    negative_prompt_2: str | None
    true_cfg_scale: float
    seed: int | None
    index: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str | None
    skip: str | None
    max_sequence_length: int
    height: int
    width: int
    strength: float | None
    image_sha256: str | None
    mask_sha256: str | None
    padding_mask_crop: int | None
    outpaint: str | None
    bundle_hash: str
    fluxdeploy_version: str
    loras: str | None = None
    control_sha256: str | None = None
    control: str | None = None
    max_area: int | None = None
    auto_resize: str | None = None
    control_mode: str | None = None
    controlnet_conditioning_scale: str | None = None
    control_guidance_start: str | None = None
    control_guidance_end: str | None = None
    redux_sha256: str | None = None
    prompt_embeds_scale: str | None = None
    pooled_prompt_embeds_scale: str | None = None
    ip_adapter_sha256: str | None = None
    negative_ip_adapter_sha256: str | None = None
    ip_adapter_scale: str | None = None


def to_pil(pictures: Iterable[NDArray[np.float32]]) -> list[Image]:
    """8-bit pictures of float32 [H, W, 3] in 0..1: 255x, rounded half to even."""
    from PIL import Image

    return [Image.fromarray(np.rint(picture * 255).astype(np.uint8)) for picture in pictures]


def check_picture_path(path: Path) -> None:
    """Raise `UsageError` unless `path` is that of a PNG: other formats would lose the metadata."""
    if path.suffix.lower() != ".png":
        raise UsageError(
            f"{path} is no name for a picture: only PNG files are written, since they carry the "
            "prompt and the seed. End the name in .png."
        )


def picture_paths(path: Path, count: int, seeds: Sequence[int] | None = None) -> list[Path]:
    """`count` names: `image.png` itself for one, else `image-0.png`, `image-1.png`, ...

    With a seed for each they are `image-0-seed7.png`, ... Raises `UsageError` for names that are
    not of a PNG.
    """
    check_picture_path(path)
    if count == 1:
        return [path]
    ends = [""] * count if seeds is None else [f"-seed{seed}" for seed in seeds]
    return [path.with_name(f"{path.stem}-{i}{end}{path.suffix}") for i, end in enumerate(ends)]


def save_picture(image: Image, path: Path, metadata: PictureMetadata) -> None:
    """Write a PNG with its metadata. A file that was there stays until the new one is complete.

    Raises as `write_png` does.
    """
    write_file(encode_picture(image, metadata), path)


def encode_picture(image: Image, metadata: PictureMetadata) -> bytes:
    """A PNG with its metadata, as the bytes of a file."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for field in fields(metadata):
        value = getattr(metadata, field.name)
        if value is not None:
            # Pillow makes it an iTXt chunk (UTF-8) where Latin-1 cannot hold the text. A lone
            # surrogate, from a badly encoded command line, has no UTF-8 at all.
            chunks.add_text(field.name, str(value).encode("utf-8", "replace").decode("utf-8"))
    return _png(image, chunks)


def write_png(image: Image, path: Path) -> None:
    """Write a PNG without metadata. Writes and raises as `write_file`."""
    write_file(_png(image), path)


def _png(image: Image, chunks: PngInfo | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def write_file(data: bytes, path: Path) -> None:
    """Write the bytes of a PNG. A file that was there stays until the new one is complete.

    What killed writers have left in that folder is removed.

    Raises `UsageError` for a name that is not of a PNG, and `FluxDeployError` where the file
    cannot be written.
    """
    check_picture_path(path)
    try:
        with replacing_picture(path) as file:
            file.write(data)
    except OSError as error:
        raise FluxDeployError(
            f"Cannot write {path}: {error.strerror or error}. Choose a folder that exists and can "
            "be written, with room for the picture."
        ) from error


def read_metadata(path: Path) -> PictureMetadata:
    """What `save_picture` wrote into a PNG. No pixel is decoded.

    Raises `FluxDeployError` where the file cannot be read, or was not written by it.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FluxDeployError(
            f"{path} cannot be read as a PNG: {reason}. Give a picture that fluxdeploy wrote."
        ) from error
    try:
        return PictureMetadata(
            prompt=text["prompt"],
            prompt_2=text.get("prompt_2"),
            negative_prompt=text.get("negative_prompt"),
            negative_prompt_2=text.get("negative_prompt_2"),
            true_cfg_scale=_number(float, text["true_cfg_scale"]),
            seed=_number(int, text["seed"]) if "seed" in text else None,
            index=_number(int, text["index"]),
            num_inference_steps=_number(int, text["num_inference_steps"]),
            guidance_scale=_number(float, text["guidance_scale"]),
            sampler=text.get("sampler"),
            skip=text.get("skip"),
            max_sequence_length=_number(int, text["max_sequence_length"]),
            height=_number(int, text["height"]),
            width=_number(int, text["width"]),
            strength=_number(float, text["strength"]) if "strength" in text else None,
            image_sha256=text.get("image_sha256"),
            mask_sha256=text.get("mask_sha256"),
            padding_mask_crop=(
                _number(int, text["padding_mask_crop"]) if "padding_mask_crop" in text else None
            ),
            outpaint=text.get("outpaint"),
            bundle_hash=text["bundle_hash"],
            fluxdeploy_version=text["fluxdeploy_version"],
            loras=text.get("loras"),
            max_area=_number(int, text["max_area"]) if "max_area" in text else None,
            **{name: text.get(name) for name in _LATER_TEXTS},
        )
    except (KeyError, ValueError) as error:
        raise FluxDeployError(
            f"{path} does not say how it was made: its metadata is missing or was changed. Give a "
            "picture that fluxdeploy wrote."
        ) from error


def _number(kind: type[_N], digits: str) -> _N:
    """A number as `save_picture` writes it. Raises `ValueError`.

    Python takes quadratic time for long ones, and reads "nan", which JSON does not have.
    """
    if len(digits) > _MAX_DIGITS or not math.isfinite(number := kind(digits)):
        raise ValueError(digits[:_MAX_DIGITS])
    return number
