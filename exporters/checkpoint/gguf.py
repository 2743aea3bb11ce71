"""The container of GGUF files, versions 2 and 3: header, metadata and the places of the tensors.

Nothing in it is trusted: each count, length, type, shape and offset is held against the bytes that
are there before it is used. Sizes stand with the fastest axis first, and count numbers, not bytes.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporters.checkpoint.ggml import TYPE_NAMES, TYPES, GgmlType
from fluxdeploy.bundle.files import open_regular
from fluxdeploy.bundle.tensorfile import TensorEntry
from fluxdeploy.bundle.typed_json import shortened
from fluxdeploy.errors import CheckpointError

__all__ = ["GgufEntry", "is_gguf", "read_gguf"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ARCHITECTURES = ("flux", "t5encoder")

_MAX_HEADER = 8 << 20
"""FLUX.1's takes 0.1 MiB, T5's with its vocabulary 1 MiB."""

_MAX_AXES = 4

_STRING, _ARRAY = 8, 9
# Of the metadata's types, by their numbers.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}

_LEAST_TENSOR, _LEAST_PAIR = 24, 13
"""Bytes that a tensor's description and an entry of the metadata take at least."""

_ORIGINAL = "comfy.gguf.orig_shape."
"""Before a tensor's name: the sizes that it had before it was folded into rows of whole blocks."""

_MOST_KEPT = 8
"""Numbers of an array that are kept: longer ones are vocabularies, which nobody here reads."""


@dataclass(frozen=True)
class GgufEntry(TensorEntry):
    """A tensor of a GGUF file, whose `dtype` is the name of its type: `packing` widens it."""

    packing: GgmlType


class _GgufError(ValueError):
    """What is wrong with a file, to be completed with its name."""

    def __init__(self, problem: str) -> None:
        super().__init__(shortened(problem))


def is_gguf(file: Path) -> bool:
    """Whether a file begins as a GGUF file does; what cannot be read does not."""
    try:
        with open_regular(file) as opened:
            return opened.read(len(_MAGIC)) == _MAGIC
    except (OSError, CheckpointError):
        return False


def read_gguf(file: Path) -> Mapping[str, GgufEntry]:
    """The tensors of a GGUF file of a FLUX.1 transformer or a T5 encoder; no weight is read.

    Raises `CheckpointError` for a file that is not whole, contradicts itself, is of another
    architecture or big endian, and for a tensor of a type that is not read.
    """
    try:
        with open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            header = opened.read(min(size, _MAX_HEADER))
        return _parse(file, header, size)
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror or error}.") from error
    except _GgufError as error:
        raise CheckpointError(
            f"{file} is not a whole GGUF file: {error}. Download or convert it again."
        ) from error


def _parse(file: Path, data: bytes, size: int) -> Mapping[str, GgufEntry]:
    header = _Cursor(data, size)
    header.skip(len(_MAGIC), "its version")
    version = header.number("I", "its version")
    if version and version & 0xFFFF == 0:
        raise CheckpointError(
            f"{file} is a GGUF file for big-endian machines, which is not read: convert it again "
            "for little-endian ones."
        )
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{file} is a GGUF file of version {version}; versions 2 and 3 are read: convert it "
            "again."
        )
    tensors = header.count(_LEAST_TENSOR, "tensors")
    pairs = header.count(_LEAST_PAIR, "entries of metadata")
    metadata: dict[str, Any] = {}
    for number in range(pairs):
        key = header.string(f"the key of entry {number} of its metadata")
        if key in metadata:
            raise _GgufError(f"its metadata has the key {key!r} twice")
        metadata[key] = header.value(header.number("I", f"the type of {key!r}"), key)
        if key == "general.architecture":
            _check_architecture(file, metadata[key])
    _check_split(file, metadata.get("split.count"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _GgufError(f"its general.alignment is {alignment!r}, not a power of 2")
    found: dict[str, GgufEntry] = {}
    for number in range(tensors):
        entry = _describe(header, file, number)
        if entry.name in found:
            raise _GgufError(f"it has the tensor {entry.name!r} twice")
        found[entry.name] = entry
    if not found:
        raise _GgufError("it has no tensors")
    start = -(-header.position // alignment) * alignment
    return {
        entry.name: _unfolded(entry, metadata)
        for entry in _placed(found.values(), start, alignment, size)
    }


def _check_architecture(file: Path, architecture: Any) -> None:
    # Some converters write none: the tensors then tell.
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{file} is a GGUF file of the architecture {architecture!r:.80}; "
            f"{' and '.join(_ARCHITECTURES)} are read."
        )


def _check_split(file: Path, count: Any) -> None:
    if isinstance(count, int) and count > 1:
        raise CheckpointError(
            f"{file} is one of {count} parts of a GGUF file, which are not read: join them with "
            "`llama-gguf-split --merge`."
        )


class _Cursor:
    """Reads a header of at most `_MAX_HEADER` bytes from its start, and nothing past its end."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data = data
        self._cut = size <= len(data)
        self.position = 0

    def skip(self, count: int, what: str) -> int:
        """Pass over some bytes; returns where they begin."""
        start = self.position
        if count > len(self._data) - start:
            where = "the file ends" if self._cut else f"{_MAX_HEADER >> 20} MiB, the most, end"
            raise _GgufError(f"{where} before {what}")
        self.position += count
        return start

    def number(self, form: str, what: str) -> Any:
        start = self.skip(struct.calcsize(f"<{form}"), what)
        return struct.unpack_from(f"<{form}", self._data, start)[0]

    def count(self, least: int, what: str) -> int:
        """How many things follow that take `least` bytes each, at least."""
        count: int = self.number("Q", f"the number of its {what}")
        if count > (len(self._data) - self.position) // least:
            raise _GgufError(f"it would have {count} {what}, more than its bytes can hold")
        return count

    def string(self, what: str) -> str:
        length = self.number("Q", f"the length of {what}")
        start = self.skip(length, f"the end of {what}")
        try:
            return self._data[start : self.position].decode("utf-8")
        except UnicodeDecodeError:
            raise _GgufError(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        """A value of the metadata; None for an array that is not kept."""
        what = f"the value of {key!r}"
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            return self.number(_scalar(kind, key), what)
        kind = self.number("I", what)
        if kind == _STRING:
            for _ in range(self.count(8, f"strings in {key!r}")):
                self.skip(self.number("Q", what), what)
            return None
        form = _scalar(kind, key)
        width = struct.calcsize(f"<{form}")
        count = self.count(width, f"numbers in {key!r}")
        if count > _MOST_KEPT:
            self.skip(count * width, what)
            return None
        return [self.number(form, what) for _ in range(count)]


def _scalar(kind: int, key: str) -> str:
    if kind not in _SCALARS:
        raise _GgufError(f"its metadata's {key!r} is of the unknown type {kind}")
    return _SCALARS[kind]


def _describe(header: _Cursor, file: Path, number: int) -> GgufEntry:
    """A tensor; its `offset` counts from the first tensor's start."""
    name = header.string(f"the name of tensor {number}")
    axes = header.number("I", f"the sizes of the tensor {name!r}")
    if axes > _MAX_AXES:
        raise _GgufError(f"the tensor {name!r} has {axes} axes; at most {_MAX_AXES} are allowed")
    sizes = [header.number("Q", f"the sizes of the tensor {name!r}") for _ in range(axes)]
    kind = header.number("I", f"the type of the tensor {name!r}")
    offset = header.number("Q", f"the place of the tensor {name!r}")
    if kind not in TYPE_NAMES:
        raise _GgufError(f"the tensor {name!r} is of the unknown type {kind}")
    if kind not in TYPES:
        raise CheckpointError(
            f"Tensor {name!r:.80} in {file} is stored as {TYPE_NAMES[kind]}, which is not read: "
            f"use or make a file of {', '.join(each.name for each in TYPES.values())}."
        )
    packing = TYPES[kind]
    if math.prod(max(size, 1) for size in sizes) * 8 >= 2**63:
        raise _GgufError(f"the tensor {name!r} has sizes that are too large: {sizes}")
    row = sizes[0] if sizes else 1
    if row % packing.elements:
        raise _GgufError(
            f"the rows of the tensor {name!r} have {row} numbers, and blocks of {packing.name} "
            f"have {packing.elements}"
        )
    nbytes = math.prod(sizes) // packing.elements * packing.block_bytes
    return GgufEntry(name, packing.name, tuple(reversed(sizes)), offset, nbytes, packing)


def _placed(
    found: Iterable[GgufEntry], start: int, alignment: int, size: int
) -> Iterator[GgufEntry]:
    """The tensors in the order of their bytes, with offsets from the start of the file."""
    end = 0
    for entry in sorted(found, key=lambda entry: (entry.offset, entry.nbytes)):
        expected = -(-end // alignment) * alignment
        if entry.offset != expected:
            relation = "overlaps the one before it" if entry.offset < end else "is out of its place"
            raise _GgufError(
                f"the tensor {entry.name!r} {relation}: it starts at byte {entry.offset} of the "
                f"data instead of {expected}"
            )
        end = entry.offset + entry.nbytes
        if start + end > size:
            raise _GgufError(
                f"it has {size} bytes, and the tensor {entry.name!r} ends at {start + end}"
            )
        yield replace(entry, offset=start + entry.offset)


def _unfolded(entry: GgufEntry, metadata: Mapping[str, Any]) -> GgufEntry:
    """A tensor in the shape that it had when its converter has written that down."""
    key = f"{_ORIGINAL}{entry.name}"
    if key not in metadata:
        return entry
    shape = metadata[key]
    if (
        not isinstance(shape, list)
        or not all(type(size) is int and size >= 0 for size in shape)
        or math.prod(shape) != math.prod(entry.shape)
    ):
        raise _GgufError(
            f"its metadata's {key!r} is {shape!r}, and the tensor has the shape {list(entry.shape)}"
        )
    return replace(entry, shape=tuple(shape))
