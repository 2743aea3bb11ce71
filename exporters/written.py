"""Weights whose bytes change on their way into a bundle: converted or quantized, in new files.

One tensor is in memory at a time, and of a tensor that is only converted a part of it. The files
are of moderate size, so that a build that was stopped has little to do again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporters.checkpoint.tensors import StoredTensor
from exporters.quantize.storage import Packed
from exporters.quantize.weights import pack_weight
from fluxdeploy.errors import CheckpointError
from fluxdeploy.tensorfile import DTYPE_BITS, TensorFileWriter, from_float32

__all__ = ["Group", "WrittenTensor", "shards", "write_tensors"]

_CHUNK = 1 << 24
"""Elements converted at a time: 64 MB in float32, whatever the size of a tensor."""

_SHARD = 1 << 29
"""Bytes after which a file is full."""


@dataclass(eq=False)
class Group:
    """Weights that are quantized with one scale, for which all of them have to be looked at."""

    members: list[StoredTensor] = field(default_factory=list)

    @cached_property
    def largest(self) -> float | None:
        """The largest magnitude in them; None of one alone, which needs no look beforehand.

        Every weight is read for it once, a part at a time.
        """
        if len(self.members) == 1:
            return None
        return max(float(np.abs(part).max()) for stored in self.members for part in _read(stored))


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of a new file: `dtype` is its safetensors type there.

    With `packed` it is a linear's weight [out, in], stored transposed, with its scales after it;
    `group` are the weights that it shares a scale with, itself among them.
    """

    name: str
    stored: StoredTensor
    dtype: str
    packed: Packed | None = None
    group: Group | None = None

    @property
    def declarations(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, type and shape of what is written."""
        if self.packed is None:
            return [(self.name, self.dtype, self.stored.shape)]
        rows, columns = self.stored.shape
        return self.packed.declarations(self.name, rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes of what is written."""
        return sum(
            math.prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in self.declarations
        )


def shards(
    stem: str, tensors: Iterable[WrittenTensor]
) -> Iterator[tuple[str, list[WrittenTensor]]]:
    """File names and the tensors of each, in order."""
    groups: list[list[WrittenTensor]] = []
    size = _SHARD
    for tensor in tensors:
        if size >= _SHARD:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    for number, group in enumerate(groups, 1):
        part = f"-{number:05}-of-{len(groups):05}" if len(groups) > 1 else ""
        yield f"{stem}{part}.safetensors", group


def write_tensors(
    path: Path, tensors: Iterable[WrittenTensor], on_bytes: Callable[[int], None]
) -> None:
    """Write a safetensors file; `on_bytes` hears of the bytes written.

    Raises `CheckpointError` for a value that the type cannot hold, and `BundleError` where the
    disk refuses; then no file is left.
    """
    tensors = list(tensors)
    declared = [declaration for tensor in tensors for declaration in tensor.declarations]
    with TensorFileWriter(path, declared) as writer:
        for tensor in tensors:
            for part in _parts(tensor):
                writer.write(part)
                on_bytes(part.nbytes)


def _parts(tensor: WrittenTensor) -> Iterator[np.ndarray]:
    stored = tensor.stored
    if tensor.packed is not None:
        largest = None if tensor.group is None else tensor.group.largest
        weight = stored.read().reshape(stored.shape)
        yield from pack_weight(weight, tensor.packed, stored.name, largest)
        return
    for values in _read(stored):
        narrow = from_float32(values, tensor.dtype)
        if tensor.dtype == "F16" and np.isinf(narrow).any() and np.isfinite(values).all():
            raise CheckpointError(
                f"Tensor {stored.name} holds values up to {np.abs(values).max():.3g}, past FP16's "
                "65504: build with --precision bf16."
            )
        yield narrow


def _read(stored: StoredTensor) -> Iterator[NDArray[np.float32]]:
    """A tensor's numbers in order, a part at a time."""
    count = math.prod(stored.shape)
    for start in range(0, count, _CHUNK):
        yield stored.read(start, min(start + _CHUNK, count))
