"""Weights whose bytes change on their way into a bundle: converted or quantized, in new files.

Files are written side by side, so that all cores are busy while one of them waits for the disk. In
memory is, for each of these, the tensor that is quantized, as it will be stored, and a part of what
it is made from. The files are of moderate size, so that a build that was stopped has little to do
again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from exporters.checkpoint.tensors import StoredTensor
from exporters.formats import Packed
from fluxdeploy.bundle.tensorfile import DTYPE_BITS, TensorFileWriter, from_float32
from fluxdeploy.errors import CheckpointError

__all__ = ["Group", "WrittenTensor", "shards", "write_files", "write_tensors"]

_CHUNK = 1 << 19
"""Elements converted at a time: 2 MB in float32, which stay in a core's cache."""

_SHARD = 1 << 29
"""Bytes after which a file is full."""

_MOST_FILES = 8
"""Files that are written at a time, at most: each takes memory for its largest tensor."""


@dataclass(eq=False)
class Group:
    """Weights that are quantized with one scale, for which all of them have to be looked at."""

    members: list[StoredTensor] = field(default_factory=list)

    @cached_property
    def largest(self) -> float:
        """The largest magnitude in them. Every weight is read for it once, a part at a time."""
        return max(_largest(stored) for stored in self.members)


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of a new file: `dtype` is its safetensors type there.

    With `packed` it is a linear's weight [out, in], stored transposed, with its scales after it;
    `group` are the weights that it shares a scale with, itself among them. `bias` is the linear's,
    where it makes up for what is rounded: it stands behind the weight.
    """

    name: str
    stored: StoredTensor
    dtype: str
    packed: Packed | None = None
    group: Group | None = None
    bias: WrittenTensor | None = None

    @property
    def declarations(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, type and shape of what is written."""
        if self.packed is None:
            return [(self.name, self.dtype, self.stored.shape)]
        rows, columns = self.stored.shape
        added = [] if self.bias is None else self.bias.declarations
        return self.packed.declarations(self.name, rows, columns) + added

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


def write_files(
    folder: Path,
    files: Mapping[str, Sequence[WrittenTensor]],
    on_bytes: Callable[[int], None],
    on_file: Callable[[str, str], None],
) -> None:
    """Write safetensors files below `folder`, several at a time, each as `write_tensors` does.

    `on_bytes` is never called concurrently. `on_file` hears of a file's name and SHA-256 when it
    is whole, in the caller's thread, and not always in order. Where a file fails, the ones before
    it are still finished and the ones after it are given up, so that the error is the first one in
    order. Ctrl-C gives up all that are not whole.
    """
    names = list(files)
    failed = len(names)
    lock = threading.Lock()

    def write(number: int) -> str:
        def report(count: int) -> None:
            if number > failed:
                raise InterruptedError
            with lock:
                on_bytes(count)

        report(0)
        return write_tensors(folder / names[number], files[names[number]], report)

    with _threads(len(names)) as pool:
        try:
            futures = [pool.submit(write, number) for number in range(len(names))]
            for future in as_completed(futures):
                number = futures.index(future)
                if future.exception() is None:
                    on_file(names[number], future.result())
                else:
                    failed = min(failed, number)
        except BaseException:
            failed = -1
            raise
    if failed < len(names):
        futures[failed].result()


@contextmanager
def _threads(wanted: int) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use, and one for the time that the others wait for a disk."""
    usual = torch.get_num_threads()
    workers = max(1, min(wanted, usual + 1, _MOST_FILES))
    # Each thread would start as many of its own.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            yield pool
    finally:
        # What a thread sets holds for all that start after it.
        torch.set_num_threads(usual)


def write_tensors(
    path: Path, tensors: Iterable[WrittenTensor], on_bytes: Callable[[int], None]
) -> str:
    """Write a safetensors file and return its SHA-256; `on_bytes` hears of the bytes written.

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
    return writer.sha256


def _parts(tensor: WrittenTensor) -> Iterator[np.ndarray]:
    stored = tensor.stored
    if tensor.packed is not None:
        yield from _packed(tensor, tensor.packed)
        return
    for values in _read(stored):
        yield _narrow(values, tensor)


def _packed(tensor: WrittenTensor, packed: Packed) -> Iterator[np.ndarray]:
    """A quantized weight's bytes, and those of its linear's bias where that is corrected."""
    rows, columns = tensor.stored.shape
    group = tensor.group or Group([tensor.stored])
    products = []

    def seen() -> Iterator[NDArray[np.float32]]:
        for part in _read_rows(tensor.stored):
            if packed.mean is not None:
                products.append(part @ packed.mean)
            yield part  # which is overwritten

    made = [*packed.pack(seen(), (rows, columns), tensor.stored.name, lambda: group.largest)]
    yield from made
    if tensor.bias is not None:
        lost = np.concatenate(products) - packed.mean_product(made, (rows, columns))
        yield _narrow(tensor.bias.stored.read() + lost, tensor.bias)


def _narrow(values: NDArray[np.float32], tensor: WrittenTensor) -> np.ndarray:
    narrow = from_float32(values, tensor.dtype)
    if tensor.dtype == "F16" and np.isinf(narrow).any():
        raise CheckpointError(
            f"Tensor {tensor.stored.name} holds values up to {_largest(tensor.stored):.3g}, past "
            "FP16's 65504: build with --precision bf16."
        )
    return narrow


def _read(stored: StoredTensor) -> Iterator[NDArray[np.float32]]:
    """A tensor's numbers in order, a part at a time."""
    count = math.prod(stored.shape)
    for start in range(0, count, _CHUNK):
        yield stored.read(start, min(start + _CHUNK, count))


def _read_rows(stored: StoredTensor) -> Iterator[NDArray[np.float32]]:
    """A weight's rows [some, in] in order, an even number of them at a time where it has one."""
    rows, columns = stored.shape
    some = max(_CHUNK // columns // 2 * 2, 2)
    for start in range(0, rows, some):
        part = stored.rows(start, min(start + some, rows))
        yield part.read().reshape(part.shape)


def _largest(stored: StoredTensor) -> float:
    return max(float(np.abs(part).max()) for part in _read(stored))
