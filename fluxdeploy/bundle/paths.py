"""What the path of a bundle's file may be."""

from __future__ import annotations

import re

__all__ = ["HIDDEN", "path_problem"]

HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]",
)
"""Control characters, ends of lines, and marks of the direction of writing."""

_MAX_NAME, _MAX_PATH = 255, 1024
"""Bytes of a file's name, and characters of a path below a bundle, whose own comes before it."""


def path_problem(path: str) -> str | None:
    """Why `path` cannot name a file of a bundle, or None where it can.

    Paths are relative to the bundle, with forward slashes, and never leave it on any system.
    """
    if not path:
        return "is empty"
    if HIDDEN.search(path):
        return "holds a control character"
    if "\\" in path:
        return "holds a backslash; paths have forward slashes"
    if path.startswith("/") or re.match("[A-Za-z]:", path):
        return "is absolute; paths are relative to the bundle"
    parts = path.split("/")
    if ".." in parts:
        return "leaves the bundle"
    if "" in parts or "." in parts:
        return "has an empty part"
    if (
        any(len(part.encode("utf-8", "surrogatepass")) > _MAX_NAME for part in parts)
        or len(path) > _MAX_PATH
    ):
        return "is longer than file systems allow"
    return None
