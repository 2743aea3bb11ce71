"""The bodies of requests, read within bounds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from PIL.Image import Image
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxdeploy.errors import FluxDeployError
from fluxdeploy.host.input_images import decode_image, decode_mask
from fluxdeploy.serve.images_api.errors import ApiError, as_api_error

__all__ = ["LimitedBodies", "decoded", "read_body", "read_files", "read_form"]

_T = TypeVar("_T")

# It tells of each form that is damaged, on stderr; the client is told.
logging.getLogger("python_multipart").setLevel(logging.ERROR)

_FIELDS, _FILES = 40, 4
_FIELD_BYTES = 1 << 20
_JSON_BYTES = 1 << 20

_PATIENCE = 60.0
"""Seconds for a body to arrive."""


class LimitedBodies:
    """A layer of the application under which no body is longer than so many bytes."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self._app = app
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an application of ASGI. What reads too much raises `ApiError`."""
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body:
                raise ApiError(
                    413, f"The body has more than the {self._max_body} bytes that are taken."
                )
            return message

        await self._app(scope, limited, send)


async def read_body(request: Request) -> bytes:
    """The whole body of a request in JSON. Raises `ApiError`."""
    body = await _in_time(request.body())
    if len(body) > _JSON_BYTES:
        raise ApiError(413, f"The body has more than the {_JSON_BYTES} bytes that JSON may have.")
    return body


async def read_form(request: Request) -> FormData:
    """A form with its files. Raises `ApiError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(400, "Send a form: the content type must be multipart/form-data.")
    try:
        return await _in_time(
            request.form(max_files=_FILES, max_fields=_FIELDS, max_part_size=_FIELD_BYTES)
        )
    except HTTPException as error:
        raise ApiError(400, f"The form cannot be read: {error.detail}") from None


async def _in_time(reading: Awaitable[_T]) -> _T:
    try:
        return await asyncio.wait_for(reading, _PATIENCE)
    except (asyncio.TimeoutError, TimeoutError):
        raise ApiError(408, f"The body did not arrive within {_PATIENCE:.0f} s.") from None


async def read_files(form: FormData) -> tuple[dict[str, str], bytes, bytes | None]:
    """The fields of an edit's form, its image's file, and its mask's. Raises `ApiError`."""
    fields: dict[str, str] = {}
    files: dict[str, list[UploadFile]] = {"image": [], "mask": []}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            kind = "image" if name == "image[]" else name
            if kind not in files:
                raise ApiError(400, f"The file {kind[:64]!r} is unknown. Send image and mask.")
            files[kind].append(value)
        elif name in fields:
            raise ApiError(400, f"The field {name[:64]!r} is there twice.")
        elif name in files:
            raise ApiError(400, f"`{name}` must be a file.", name)
        else:
            fields[name] = value
    for kind, held in files.items():
        if len(held) > 1:
            raise ApiError(400, f"There are {len(held)} files {kind}. Send one.", kind)
    if not files["image"]:
        raise ApiError(400, "The file `image` is missing.", "image")
    masks = files["mask"]
    return fields, await files["image"][0].read(), await masks[0].read() if masks else None


def decoded(image: bytes, mask: bytes | None) -> tuple[Image, Image | None]:
    """The pictures in an edit's files. Raises `ApiError`."""
    return _decoded("image", image, decode_image), (
        None if mask is None else _decoded("mask", mask, decode_mask)
    )


def _decoded(kind: str, data: bytes, decode: Callable[[bytes, str], Image]) -> Image:
    try:
        return decode(data, f"`{kind}`")
    except FluxDeployError as error:
        answer = as_api_error(error)
        answer.param = kind
        raise answer from error
