"""Pictures as clients get them: files, base64 in JSON, server-sent events."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

from PIL.Image import Image

__all__ = ["MEDIA_TYPES", "as_base64", "encode", "event"]

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

_QUALITY = 90

_PNG_LEVEL = 1
"""Of zlib: a fifth of the time of its own choice, for files that are a tenth larger."""


def encode(image: Image, output_format: str, compression: int | None) -> bytes:
    """The picture's file; `compression` is JPEG's and WebP's quality in percent."""
    buffer = io.BytesIO()
    if output_format == "png":
        image.save(buffer, "PNG", compress_level=_PNG_LEVEL)
    else:
        quality = _QUALITY if compression is None else compression
        image.save(buffer, output_format.upper(), quality=quality)
    return buffer.getvalue()


def as_base64(data: bytes) -> str:
    """As `b64_json` has it."""
    return base64.b64encode(data).decode("ascii")


def event(name: str, fields: Mapping[str, Any]) -> bytes:
    """A server-sent event, with its name as `type` in its data."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode()
