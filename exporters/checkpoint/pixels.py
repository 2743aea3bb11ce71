"""What a preprocessor_config.json of transformers says of an image encoder's pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.checkpoint.agreement import unknown_keys
from fluxdeploy.bundle.pixels import FILTERS, PixelSpec, check_pixels
from fluxdeploy.bundle.typed_json import FieldError
from fluxdeploy.errors import CheckpointError

__all__ = ["pixel_notices", "read_pixels"]

# What transformers' classes do where a config says nothing.
_SIGLIP: Mapping[str, Any] = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_CLIP: Mapping[str, Any] = {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_USUAL: Mapping[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_pad": False,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
_CLASSES: Mapping[str, Mapping[str, Any]] = {
    "SiglipImageProcessor": _SIGLIP,
    "SiglipFeatureExtractor": _SIGLIP,
    "CLIPImageProcessor": _CLIP,
    "CLIPFeatureExtractor": _CLIP,
}
_SWITCHES = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_pad")

_OTHERS = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "crop_size",
    "do_convert_rgb",
    "data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "image_seq_length",
    "input_data_format",
    "pad_size",
    "return_tensors",
)
"""Keys that say nothing of a picture in RGB, or are read beside the usual ones."""


def read_pixels(config: Mapping[str, Any], file: Path) -> PixelSpec:
    """What a preprocessor_config.json asks for. `file` is named in errors.

    Raises `CheckpointError` for another class than SigLIP's and CLIP's, and for what makes no
    pixels of one known size.
    """
    given = {key: value for key, value in config.items() if value is not None}
    kind = given.get("image_processor_type", given.get("feature_extractor_type"))
    # transformers 4 had a second class of each, which does the same.
    known = _CLASSES.get(str(kind).removesuffix("Fast"))
    if known is None:
        raise CheckpointError(
            f"{file} is one of a {kind!r:.80}; {' and '.join(list(_CLASSES)[::2])} are read."
        )
    said = {**_USUAL, **known, **given}
    for name in _SWITCHES:
        if not isinstance(said[name], bool):
            raise CheckpointError(f"{file} says {name} {said[name]!r:.80}; it is true or false.")
    if said["do_pad"] or not said["do_resize"]:
        raise CheckpointError(
            f"{file} says do_resize {said['do_resize']} and do_pad {said['do_pad']}: pictures of "
            "any size are resized, and not padded."
        )
    if said["resample"] not in range(len(FILTERS)):
        raise CheckpointError(
            f"{file} says resample {said['resample']!r:.80}; 0 to {len(FILTERS) - 1} are allowed."
        )
    spec = PixelSpec(
        resize=_size(file, "size", said["size"]),
        crop=_size(file, "crop_size", said.get("crop_size")) if said["do_center_crop"] else None,
        filter=FILTERS[said["resample"]],
        scale=_number(file, "rescale_factor", said["rescale_factor"]) if said["do_rescale"] else 1,
        mean=_colours(file, "image_mean", said["image_mean"]) if said["do_normalize"] else (0,) * 3,
        std=_colours(file, "image_std", said["image_std"]) if said["do_normalize"] else (1,) * 3,
    )
    try:
        check_pixels(spec, "")
    except FieldError as error:
        raise CheckpointError(f"What {file} asks for cannot be: {error}.") from error
    return spec


def pixel_notices(config: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence on the keys that nobody here knows; empty without any."""
    known = {*_OTHERS, *_USUAL, *_CLIP}
    return unknown_keys("The image encoder's preprocessor_config.json", config, known)


def _size(file: Path, name: str, value: object) -> tuple[int, ...]:
    """[height, width], or [side] of the shorter one."""
    if isinstance(value, dict):
        sides = [value.get("height"), value.get("width")]
        sides = [value.get("shortest_edge")] if sides == [None, None] else sides
    else:
        # As old files have it: a crop is then square, and a size a shorter side.
        sides = [value, value] if name == "crop_size" else [value]
    whole = [side for side in sides if isinstance(side, int) and not isinstance(side, bool)]
    if len(whole) != len(sides):
        raise CheckpointError(
            f"{file} says {name} {value!r:.80}; height and width are needed, or shortest_edge."
        )
    return tuple(whole)


def _colours(file: Path, name: str, value: object) -> tuple[float, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise CheckpointError(f"{file} says {name} {value!r:.80}; it has a number for each colour.")
    return tuple(_number(file, name, each) for each in value)


def _number(file: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{file} says {name} {value!r:.80}; a number is needed.")
    return float(value)
