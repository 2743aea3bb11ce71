"""What one line of a batch asks for: the arguments of a call, as plain values."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fluxdeploy.arguments import shown
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.lora import LoraFile, parse_lora
from fluxdeploy.sampling.noise import check_seed

__all__ = ["COLUMNS", "TEXTS", "Order", "read_orders"]

TEXTS = ("prompt_2", "negative_prompt", "negative_prompt_2")
"""Texts of an order beside the prompt; None where there is none."""

_INTEGERS = (
    "width",
    "height",
    "num_inference_steps",
    "num_images_per_prompt",
    "padding_mask_crop",
    "max_area",
    "max_sequence_length",
)
_NUMBERS = ("true_cfg_scale", "guidance_scale", "strength")
_SEVERAL_NUMBERS = (
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
    "ip_adapter_scale",
    "prompt_embeds_scale",
    "pooled_prompt_embeds_scale",
)
_PATHS = ("mask_image", "ip_adapter_image", "negative_ip_adapter_image")
_SEVERAL_PATHS = ("image", "control_image", "redux_image")

_OTHER_NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "num_images": "num_images_per_prompt",
    "mask": "mask_image",
    "mask_crop": "padding_mask_crop",
    "controlnet_scale": "controlnet_conditioning_scale",
    "control_start": "control_guidance_start",
    "control_end": "control_guidance_end",
    "redux_scale": "prompt_embeds_scale",
    "redux_pooled_scale": "pooled_prompt_embeds_scale",
}
"""The command's options, where the pipeline's arguments are called otherwise."""

_EXACT = 2.0**53
"""From here on a float is no longer the integer that was written."""


@dataclass(frozen=True)
class Order:
    """The arguments of `FluxPipeline.__call__`, with files instead of pictures.

    None is the bundle's default, and of `seed` a random one. image: several where a picture is
    drawn after several. outpaint: pixels that are added to the image on the left, top, right and
    bottom. control: a filter that makes the control image of what is given for it. control_image
    and the options of ControlNets: one for all of a bundle's ControlNets, or one for each; likewise
    the scales of `redux_image`. ip_adapter_scale: one for all blocks that see a picture, or one for
    each.
    """

    prompt: str
    prompt_2: str | None = None
    negative_prompt: str | None = None
    negative_prompt_2: str | None = None
    true_cfg_scale: float = 1.0
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_images_per_prompt: int = 1
    seed: int | None = None
    image: tuple[Path, ...] = ()
    mask_image: Path | None = None
    strength: float | None = None
    padding_mask_crop: int | None = None
    outpaint: tuple[int, ...] | None = None
    control_image: tuple[Path, ...] = ()
    control: str | None = None
    control_mode: tuple[int, ...] = ()
    controlnet_conditioning_scale: tuple[float, ...] = ()
    control_guidance_start: tuple[float, ...] = ()
    control_guidance_end: tuple[float, ...] = ()
    ip_adapter_image: Path | None = None
    negative_ip_adapter_image: Path | None = None
    ip_adapter_scale: tuple[float, ...] = ()
    redux_image: tuple[Path, ...] = ()
    prompt_embeds_scale: tuple[float, ...] = ()
    pooled_prompt_embeds_scale: tuple[float, ...] = ()
    max_area: int | None = None
    auto_resize: bool | None = None
    max_sequence_length: int | None = None
    sampler: str = "euler"
    skip: str | tuple[int, ...] = "none"
    lora: tuple[LoraFile, ...] = ()

    def filled(self, manifest: Manifest) -> Order:
        """The order with the bundle's defaults in place.

        Without sizes, a canvas has its own, and what is drawn after a reference the reference's.
        """
        after_reference = bool(self.image) and "kontext" in manifest.tasks
        names = ["num_inference_steps", "guidance_scale", "max_sequence_length"]
        names += ["strength"] if self.image and not after_reference else []
        names += [] if self.outpaint is not None or after_reference else ["width", "height"]
        missing = [name for name in names if getattr(self, name) is None]
        return replace(self, **{name: getattr(manifest.defaults, name) for name in missing})

    def digest(self, files: Mapping[Path, str], bundle: str) -> str:
        """What tells the order apart from every other one: 64 hexadecimal digits.

        files: the SHA-256 of the pictures and LoRAs that are given. bundle: its content hash.
        """
        plain = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        for name in _PATHS:
            path = getattr(self, name)
            if path is not None:
                plain[name] = files[path]
        for name in _SEVERAL_PATHS:
            hashes = [files[path] for path in getattr(self, name)]
            if hashes:
                plain[name] = hashes[0] if len(hashes) == 1 else hashes
        plain["lora"] = [(files[lora.path], lora.strength) for lora in self.lora]
        text = json.dumps({**plain, "bundle": bundle}, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()


COLUMNS = (*(field.name for field in fields(Order)), *_OTHER_NAMES, "out")
"""What a line may have."""


def read_orders(
    values: Mapping[str, Any], usual: Mapping[str, Any], folder: Path
) -> tuple[list[Order], str | None]:
    """The orders of a line, one for each of its seeds, and the name that it wants for its picture.

    values: by column, as JSON has them, or all as text. usual: what a line has that says nothing;
    there `seed` is a tuple of them, or None for a random one. folder: what the files of `image` and
    `mask` are relative to. Raises `UsageError`.
    """
    given: dict[str, Any] = {}
    for key, value in values.items():
        name = _column(key)
        if value is None or value == "":
            continue
        if name in given:
            raise UsageError(f"`{name}` is given twice, once as `{key}`. Leave one out.")
        given[name] = _value(name, value, folder)
    out = given.pop("out", None)
    if "prompt" not in given:
        raise UsageError("It has no `prompt`. Give one.")
    merged = {**usual, **given}
    seeds = merged.pop("seed", None) or (None,)
    return [Order(**merged, seed=seed) for seed in seeds], out


def _column(key: str) -> str:
    plain = key.strip().replace("-", "_")
    name = _OTHER_NAMES.get(plain, plain)
    if plain in COLUMNS:
        return name
    near = difflib.get_close_matches(plain, COLUMNS, n=1)
    meant = f" Did you mean `{near[0]}`?" if near else f" There are {', '.join(COLUMNS)}."
    raise UsageError(f"`{shown(key)[1:-1]}` is not known.{meant}")


def _value(name: str, value: Any, folder: Path) -> Any:
    if name in _INTEGERS:
        return _integer(name, value)
    if name in _NUMBERS:
        return _number(name, value)
    if name == "seed":
        return _seeds(value)
    if name == "outpaint":
        return _margins(value)
    if name == "skip" and value not in ("none", "auto"):
        return _steps(value)
    if name == "lora":
        return _loras(value, folder)
    if name in _SEVERAL_PATHS:
        return tuple(_file(name, each, folder) for each in _several(value))
    if name in _PATHS:
        return _file(name, value, folder)
    if name in _SEVERAL_NUMBERS:
        return tuple(_number(name, each) for each in _listed(value))
    if name == "control_mode":
        return tuple(_integer(name, each) for each in _listed(value))
    if name == "auto_resize":
        return _flag(name, value)
    if not isinstance(value, str):
        raise UsageError(f"`{name}` must be text, not {shown(value)}.")
    return value


def _file(name: str, value: Any, folder: Path) -> Path:
    if not isinstance(value, str):
        raise UsageError(f"`{name}` must be text, not {shown(value)}.")
    return folder / Path(value).expanduser()


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _flag(name: str, value: Any) -> bool:
    flags = {"true": True, "false": False, "1": True, "0": False}
    text = str(value).strip().lower()
    if text not in flags:
        raise UsageError(f"`{name}` must be true or false, not {shown(value)}.")
    return flags[text]


def _integer(name: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d{1,20}(\.0*)?\s*", value):
        return int(value.partition(".")[0])
    # Tools that know no missing integers write all of a column as floats.
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"`{name}` must be an integer, not {shown(value)}.")
    return value


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str) and len(value) <= 40:
            return float(value)
    except ValueError:
        pass
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"`{name}` must be a number, not {shown(value)}.")
    return float(value)


def _listed(value: Any) -> list[Any]:
    """A list, or one with commas between, or a single value."""
    if isinstance(value, str):
        return value.split(",")
    return _several(value)


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = tuple(_integer("seed", seed) for seed in _listed(value))
    for seed in seeds:
        check_seed(seed)
    return seeds


def _steps(value: Any) -> tuple[int, ...]:
    try:
        return tuple(_integer("skip", step) for step in _listed(value))
    except UsageError:
        raise UsageError(
            f"`skip` must be none, auto or steps such as 3,5,7, not {shown(value)}."
        ) from None


def _loras(value: Any, folder: Path) -> tuple[LoraFile, ...]:
    given = _several(value)
    if not all(isinstance(each, str) for each in given):
        raise UsageError(f"`lora` must be a file, or a list of files, not {shown(value)}.")
    return tuple(parse_lora(each, lambda name: folder / Path(name).expanduser()) for each in given)


def _margins(value: Any) -> tuple[int, ...]:
    parts = _listed(value)
    if len(parts) != 4:
        raise UsageError(
            f"`outpaint` must be the pixels on the left, top, right and bottom, not {shown(value)}."
        )
    return tuple(_integer("outpaint", part) for part in parts)
