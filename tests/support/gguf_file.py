"""GGUF files, whole or wrong on purpose: every field is as it is asked for."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["STRING", "U32", "GgufFile", "GgufTensor", "text", "value"]

U32, STRING, ARRAY = 4, 8, 9
_FORMS = {0: "B", 1: "b", 2: "H", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}


def text(words: str | bytes) -> bytes:
    """A string with its length before it."""
    data = words.encode() if isinstance(words, str) else words
    return struct.pack("<Q", len(data)) + data


def value(kind: int, given: object, items: int = U32) -> bytes:
    """A value of the metadata after its type; of an array the `items` are given."""
    if kind == STRING:
        assert isinstance(given, (str, bytes))
        return struct.pack("<I", kind) + text(given)
    if kind == ARRAY:
        assert isinstance(given, list)
        each = [text(x) if items == STRING else struct.pack(f"<{_FORMS[items]}", x) for x in given]
        return struct.pack("<IIQ", kind, items, len(given)) + b"".join(each)
    return struct.pack(f"<I{_FORMS[kind]}", kind, given)


@dataclass
class GgufTensor:
    """A tensor: its type's number, its sizes in the file's order, its bytes.

    offset: where it says that it is, from the start of the data; None for where it is.
    """

    kind: int
    sizes: tuple[int, ...]
    data: bytes
    offset: int | None = None


@dataclass
class GgufFile:
    """What a file holds. `counts` are those of tensors and metadata where they are to be wrong."""

    tensors: Mapping[str, GgufTensor]
    metadata: dict[str, bytes] = field(
        default_factory=lambda: {"general.architecture": value(STRING, "flux")}
    )
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int, int] | None = None
    alignment: int = 32

    def to_bytes(self) -> bytes:
        """The file."""
        counts = self.counts or (len(self.tensors), len(self.metadata))
        head = [self.magic, struct.pack("<IQQ", self.version, *counts)]
        head += [text(key) + pair for key, pair in self.metadata.items()]
        data = b""
        for name, tensor in self.tensors.items():
            data += bytes(-len(data) % self.alignment)
            offset = len(data) if tensor.offset is None else tensor.offset
            axes = len(tensor.sizes)
            head.append(
                text(name) + struct.pack(f"<I{axes}QIQ", axes, *tensor.sizes, tensor.kind, offset)
            )
            data += tensor.data
        begin = b"".join(head)
        return begin + bytes(-len(begin) % self.alignment) + data

    def write(self, path: Path) -> Path:
        """Write the file to `path`, and return it."""
        path.write_bytes(self.to_bytes())
        return path
