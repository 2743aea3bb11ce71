"""What replies are made of: media types and server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["MEDIA_TYPES", "event"]

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def event(name: str, fields: Mapping[str, Any]) -> bytes:
    """A server-sent event, with its name as `type` in its data."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode()
