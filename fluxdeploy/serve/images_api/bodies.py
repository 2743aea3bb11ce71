"""The fields of a request: OpenAI's, and ours beside them.

What is not listed here is refused by name, and so is what is listed and cannot be done: a picture
that lacks what was asked for helps nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from fluxdeploy.host.turns import Priority
from fluxdeploy.serve.images_api.errors import ApiError

__all__ = ["REFUSED", "EditBody", "GenerationBody", "read_fields", "read_json"]

REFUSED = {
    "complexity": "it is for drawings in SVG",
    "frame_count": "animations are not made",
    "frame_duration_ms": "animations are not made",
    "input_fidelity": "say with `strength` how much of the image may change",
    "markup": "say in the prompt what shall change, and where with `mask`",
    "style": "say it in the prompt",
    "svg": "drawings in SVG are not made",
}
"""Fields of OpenAI's that have no meaning here, and why."""

_SIZE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")


class _Body(BaseModel):
    """What generations and edits share."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    prompt: str = Field(description="What to draw.", min_length=1)
    model: str | None = Field(None, max_length=256, description="The server's model; it has one.")
    n: int = Field(1, ge=1, le=10, description="How many pictures; they share the seed.")
    size: str = Field(
        "auto",
        pattern=r"^(auto|[1-9]\d{0,5}x[1-9]\d{0,5})$",
        description="WIDTHxHEIGHT in pixels, or auto.",
    )
    quality: Literal["auto", "standard"] = Field(
        "auto", description="Quality is chosen by `num_inference_steps`."
    )
    background: Literal["auto", "opaque"] = Field("auto", description="Pictures are opaque.")
    moderation: Literal["auto", "low"] = Field("auto", description="Nothing is moderated.")
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="The picture itself, or where to fetch it for an hour."
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of JPEG and WebP in percent; 90 by default."
    )
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(
        0, ge=0, le=3, description="Pictures of the running state to stream."
    )
    user: str | None = Field(None, max_length=1024, description="Read and not used.")
    safety_identifier: str | None = Field(None, max_length=1024, description="Read and not used.")

    seed: int | None = Field(None, ge=0, lt=2**64, description="The same seed, the same picture.")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = None
    prompt_2: str | None = Field(None, description="What T5 reads instead of the prompt.")
    negative_prompt: str | None = None
    negative_prompt_2: str | None = Field(None, description="What T5 reads of it instead.")
    true_cfg_scale: float | None = Field(
        None, description="Strength of the negative prompt, used above 1."
    )
    max_sequence_length: int | None = Field(None, ge=1)
    sampler: str | None = Field(
        None, max_length=64, description="How steps use the velocity; euler by default."
    )
    skip: Literal["none", "auto"] = Field(
        "none", description="auto: leave out the evaluations that `fluxdeploy tune` found."
    )
    priority: Priority = "normal"
    preview_decoder: Literal["vae", "linear"] = Field(
        "vae", description="linear: stream a small picture of each step, at almost no cost."
    )
    stream_steps: bool = Field(False, description="Stream an event for each step too.")

    @property
    def width_and_height(self) -> tuple[int, int] | None:
        """Pixels, or None for `auto`."""
        found = _SIZE.fullmatch(self.size)
        return (int(found[1]), int(found[2])) if found else None


class GenerationBody(_Body):
    """`POST /v1/images/generations`: pictures of a prompt."""

    model_config = ConfigDict(title="Generation")


class EditBody(_Body):
    """`POST /v1/images/edits`, apart from its files: pictures made from a picture."""

    model_config = ConfigDict(title="Edit")

    strength: float | None = Field(
        None, ge=0, le=1, description="How much of the image becomes noise."
    )
    prompt_embeds_scale: float | None = Field(
        None, description="How much the prompt and each redux_image count."
    )
    pooled_prompt_embeds_scale: float | None = Field(
        None, description="How much CLIP's embedding of the prompt counts beside a redux_image."
    )
    ip_adapter_scale: float | None = Field(None, description="How much an ip_adapter_image counts.")


_B = TypeVar("_B", bound=_Body)


def read_json(kind: type[_B], raw: bytes) -> _B:
    """The body of a JSON request. Raises `ApiError`."""
    try:
        fields = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is no JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return _read(kind, fields, strict=True)


def read_fields(kind: type[_B], fields: Mapping[str, str]) -> _B:
    """The body of a form, whose values are strings. Raises `ApiError`."""
    return _read(kind, fields, strict=False)


def _read(kind: type[_B], fields: Mapping[str, Any], strict: bool) -> _B:
    # What is null was not chosen: clients send all fields that they know.
    given = {name: value for name, value in fields.items() if value is not None}
    for name in given:
        if name not in kind.model_fields:
            raise _unknown(kind, name)
    try:
        body = kind.model_validate(given, strict=strict)
    except ValidationError as error:
        raise _as_api_error(error) from None
    for condition, param, message in (
        (body.stream or not body.partial_images, "partial_images", "It needs `stream`: true."),
        (body.stream or not body.stream_steps, "stream_steps", "It needs `stream`: true."),
        (
            body.stream or body.preview_decoder == "vae",
            "preview_decoder",
            "It needs `stream`: true.",
        ),
        (not body.stream or body.n == 1, "n", "A stream has one picture: leave `n` at 1."),
        (
            not body.stream or body.response_format == "b64_json",
            "response_format",
            "A stream has its pictures in it: use 'b64_json'.",
        ),
        (
            body.output_compression is None or body.output_format != "png",
            "output_compression",
            "PNG keeps every pixel: use it with 'jpeg' or 'webp'.",
        ),
    ):
        if not condition:
            raise ApiError(400, f"`{param}`: {message}", param)
    return body


def _unknown(kind: type[_Body], name: str) -> ApiError:
    param = name if len(name) <= 64 and name.isprintable() else None
    if name in REFUSED:
        return ApiError(400, f"`{name}` cannot be had here: {REFUSED[name]}.", param)
    shown = repr(name if len(name) <= 64 else f"{name[:61]}...")
    fields = ", ".join(kind.model_fields)
    return ApiError(400, f"The field {shown} is unknown. The fields are {fields}.", param)


def _as_api_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "missing":
        return ApiError(400, f"The field `{name}` is missing.", name)
    return ApiError(400, f"`{name}`: {first['msg']}.", name)
