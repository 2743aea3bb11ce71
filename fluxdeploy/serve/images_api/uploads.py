"""The bodies of requests, read within bounds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request
from PIL.Image import Image
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxdeploy.errors import FluxDeployError
from fluxdeploy.host.input_images import decode_image, decode_mask
from fluxdeploy.serve.images_api.errors import ApiError, as_api_error

__all__ = [
    "ALONE",
    "SEEN",
    "Files",
    "LimitedBodies",
    "Pictures",
    "read_body",
    "read_files",
    "read_form",
]

_T = TypeVar("_T")

# It tells of each form that is damaged, on stderr; the client is told.
logging.getLogger("python_multipart").setLevel(logging.ERROR)

_FIELDS, _FILES = 40, 39
_FIELD_BYTES = 1 << 20
_JSON_BYTES = 1 << 20

_PATIENCE = 60.0
"""Seconds for a body to arrive."""

SEEN = ("ip_adapter_image", "negative_ip_adapter_image")
"""Files that an IP-Adapter sees, under the names of the pipeline's arguments."""

_MOST = {"image": 16, "mask": 1, "control_image": 4, "redux_image": 16}
_MOST |= dict.fromkeys(SEEN, 1)
"""Files of a name in a form."""

ALONE = ("image", "control_image", "redux_image", "ip_adapter_image")
"""Files that need no other."""

_LISTS = {f"{name}[]": name for name in ("image", "control_image", "redux_image")}


@dataclass(frozen=True)
class Pictures:
    """What a request is drawn from: pictures, a mask of the first, those to draw along, those to
    draw variations of, and those that an IP-Adapter sees, by the pipeline's arguments."""

    images: tuple[Image, ...] = ()
    mask: Image | None = None
    controls: tuple[Image, ...] = ()
    redux_images: tuple[Image, ...] = ()
    seen: Mapping[str, Image] = field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """The bytes of a form's files, by name."""

    data: Mapping[str, Sequence[bytes]]

    def decoded(self) -> Pictures:
        """The pictures in them. Raises `ApiError`."""

        def all_of(kind: str, decode: Callable[[bytes, str], Image]) -> tuple[Image, ...]:
            return tuple(_decoded(kind, data, decode) for data in self.data[kind])

        masks, controls = all_of("mask", decode_mask), all_of("control_image", decode_image)
        return Pictures(
            all_of("image", decode_image),
            masks[0] if masks else None,
            controls,
            all_of("redux_image", decode_image),
            {name: picture for name in SEEN for picture in all_of(name, decode_image)},
        )


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


async def read_files(form: FormData) -> tuple[dict[str, str], Files]:
    """The fields of an edit's form, and its files. Raises `ApiError`."""
    fields: dict[str, str] = {}
    files: dict[str, list[UploadFile]] = {name: [] for name in _MOST}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            kind = _LISTS.get(name, name)
            if kind not in files:
                known = ", ".join(_MOST)
                raise ApiError(400, f"The file {kind[:64]!r} is unknown. There are {known}.")
            files[kind].append(value)
        elif name in fields:
            raise ApiError(400, f"The field {name[:64]!r} is there twice.")
        elif name in files:
            raise ApiError(400, f"`{name}` must be a file.", name)
        else:
            fields[name] = value
    for kind, held in files.items():
        if len(held) > _MOST[kind]:
            most = "one" if _MOST[kind] == 1 else str(_MOST[kind])
            raise ApiError(400, f"There are {len(held)} files {kind}. Send {most}.", kind)
    if not any(files[kind] for kind in ALONE):
        raise ApiError(400, "The file `image` is missing.", "image")
    return fields, Files({kind: [await each.read() for each in files[kind]] for kind in files})


def _decoded(kind: str, data: bytes, decode: Callable[[bytes, str], Image]) -> Image:
    try:
        return decode(data, f"`{kind}`")
    except FluxDeployError as error:
        answer = as_api_error(error)
        answer.param = kind
        raise answer from error
