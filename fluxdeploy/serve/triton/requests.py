"""What a request's tensors ask for, and what a call's pictures are as tensors."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.base import Array
from fluxdeploy.arguments import shown
from fluxdeploy.errors import UsageError
from fluxdeploy.host.input_images import decode_image, decode_mask
from fluxdeploy.host.pipeline import FluxPipelineOutput
from fluxdeploy.serve.picture_files import as_base64, encode
from fluxdeploy.serve.triton.fields import INPUTS, STAGES, Field

__all__ = ["Asked", "final_tensors", "picture_tensors", "read_request"]

_FORMATS = {"tensor": "b64_json", "b64_json": "image"}
"""What a `response_format` leaves out."""

_IMAGES = {
    "image": decode_image,
    "mask_image": decode_mask,
    "control_image": decode_image,
    "redux_image": decode_image,
    "ip_adapter_image": decode_image,
    "negative_ip_adapter_image": decode_image,
}
"""What may come as a file's bytes, and how that is read."""

_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\r\n")


@dataclass(frozen=True)
class Asked:
    """A request: the arguments of `FluxPipeline.__call__`, and what its responses hold.

    left_out: outputs that are not sent, whoever asks for them.
    """

    arguments: Mapping[str, Any]
    step_events: bool
    left_out: frozenset[str]


def read_request(tensors: Mapping[str, Array]) -> Asked:
    """What the input tensors of a request ask for; strings are arrays of bytes.

    Raises `UsageError`. What the arguments may be is for the pipeline to say.
    """
    arguments: dict[str, Any] = {}
    values = {
        field.name: _value(field, tensors[field.name]) for field in INPUTS if field.name in tensors
    }
    for field in INPUTS:
        if field.argument is not None and field.name in values:
            arguments[field.argument] = values[field.name]
    for name, decode in _IMAGES.items():
        data = values.get(f"{name}_bytes")
        if data is not None:
            if name in arguments:
                raise UsageError(f"`{name}` and `{name}_bytes` are both there. Give one of them.")
            files = data if isinstance(data, list) else [data]
            pictures = [decode(_unpacked(each), f"`{name}_bytes`") for each in files]
            arguments[name] = pictures if len(pictures) > 1 else pictures[0]
    if "control_mode" in arguments:
        arguments["control_mode"] = _modes(arguments["control_mode"])
    chosen = values.get("response_format")
    if chosen is not None and chosen not in _FORMATS:
        raise UsageError(
            f"The response_format {shown(chosen)} is unknown. Use {' or '.join(_FORMATS)}."
        )
    left_out = frozenset() if chosen is None else frozenset([_FORMATS[chosen]])
    return Asked(arguments, bool(values.get("step_events", False)), left_out)


def _value(field: Field, values: Array) -> Any:
    if field.dims != (1,):
        if _is_file(field):
            return [_bytes(each) for each in values.flat]
        if _is_text(field):
            return [_text(field, each) for each in values.flat]
        if field.dims != (-1,):
            return values.copy()
        return values.item() if values.size == 1 else values.tolist()
    if values.size != 1:
        raise UsageError(f"`{field.name}` has shape {list(values.shape)}; it is one value, [1].")
    value = values.flat[0]
    if _is_file(field):
        return _bytes(value)
    return _text(field, value) if _is_text(field) else value.item()


def _is_file(field: Field) -> bool:
    return field.name.endswith("_bytes")


def _modes(given: Any) -> Any:
    """Kinds of control, where -1 is for a ControlNet that knows one alone."""
    if isinstance(given, list):
        return [_modes(each) for each in given]
    return None if given == -1 else given


def _is_text(field: Field) -> bool:
    return field.dtype == "STRING"


def _text(field: Field, value: Any) -> str:
    try:
        return value if isinstance(value, str) else _bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"`{field.name}` is not UTF-8 text.") from error


def _bytes(value: Any) -> bytes:
    return value.encode("utf-8") if isinstance(value, str) else bytes(value)


def _unpacked(data: bytes) -> bytes:
    """A file's bytes, which JSON can hold in base64 alone; no picture's file is text like that."""
    if not data or not _BASE64.issuperset(data):
        return data
    try:
        return base64.b64decode(data, validate=False)
    except binascii.Error:
        return data


def picture_tensors(images: list[Any], wanted: Collection[str]) -> dict[str, Array]:
    """The pictures of a response, PIL images of one size, as the outputs that are wanted."""
    tensors: dict[str, Array] = {}
    if "image" in wanted:
        tensors["image"] = np.stack([np.asarray(image) for image in images])
    if "b64_json" in wanted:
        tensors["b64_json"] = np.array(
            [as_base64(encode(image)).encode() for image in images], np.object_
        )
    return tensors


def final_tensors(
    output: FluxPipelineOutput, steps: int, wanted: Collection[str]
) -> dict[str, Array]:
    """What a call made, as the outputs that are wanted; `steps` is how many it took."""
    assert isinstance(output.images, list)  # output_type is "pil"
    tensors = picture_tensors(output.images, wanted)
    if output.seed is not None:
        tensors["seeds"] = np.empty(len(output.images), np.uint64)
        tensors["seeds"][:] = output.seed
    tensors["step"] = np.array([steps], np.int32)
    tensors["seconds"] = np.array([output.seconds.get(stage, 0.0) for stage in STAGES])
    return tensors
