"""Where a weight's bytes lie: contiguous rows of a tensor in a safetensors or GGUF file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.checkpoint.foreign import check_bytes
from exporters.checkpoint.gguf import GgufEntry, is_gguf, read_gguf
from exporters.checkpoint.packing import Packing
from fluxdeploy.bundle.tensorfile import TensorEntry, read_header, to_float32
from fluxdeploy.errors import CheckpointError
from fluxdeploy.lora import Change

__all__ = [
    "WHOLE_TYPES",
    "Index",
    "StoredTensor",
    "Weights",
    "attach_scales",
    "find_tensor",
    "read_entries",
    "read_stored",
    "same_values",
]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, or contiguous rows of one, in a safetensors or GGUF file.

    `offset` is in bytes from the start of the file. `scale` is the scalar that an FP8 checkpoint
    multiplies the stored values with. `changes` are LoRAs that are added to a linear's weight as it
    is read. `packing` widens numbers that stand in blocks: `offset` and `nbytes` are then those of
    the whole tensor, of whose numbers `skipped` come before the first row. `padding` columns of
    zeros, of those in `shape`, stand in no file but behind the stored ones.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    scale: StoredTensor | None = None
    changes: tuple[Change, ...] = ()
    packing: Packing | None = None
    skipped: int = 0
    padding: int = 0

    @classmethod
    def of(cls, file: Path, entry: TensorEntry) -> StoredTensor:
        """The whole of a tensor."""
        packing = entry.packing if isinstance(entry, GgufEntry) else None
        return cls(
            file,
            entry.name,
            entry.dtype,
            entry.shape,
            entry.offset,
            entry.nbytes,
            packing=packing,
        )

    @property
    def stored_type(self) -> str:
        """What the numbers are stored as, such as BF16, Q4_K or NF4."""
        return self.dtype if self.packing is None else self.packing.name

    @property
    def as_stored(self) -> bool:
        """Whether the numbers are the stored ones, for a graph to read in their file."""
        plain = self.scale is None and self.packing is None
        return plain and not self.changes and not self.padding

    @property
    def row_count(self) -> int:
        """The size of the first axis. Raises `CheckpointError` for a tensor without axes."""
        if not self.shape:
            raise CheckpointError(
                f"Tensor {self.name} in {self.file} is a single number, and rows are needed: "
                "the checkpoint is not a FLUX.1 model or is damaged."
            )
        return self.shape[0]

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Rows `start` to `stop` of the first axis."""
        if not 0 <= start <= stop <= self.row_count:
            raise CheckpointError(
                f"Tensor {self.name} in {self.file} has {self.row_count} rows, but rows {start} to "
                f"{stop} of it are needed: the checkpoint is not a FLUX.1 model or is damaged."
            )
        part = dataclasses.replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            changes=tuple(change.rows(start, stop) for change in self.changes),
        )
        if self.packing is not None:
            # A block may reach over the end of a row.
            before = self.skipped + start * (math.prod(self.shape[1:]) - self.padding)
            return dataclasses.replace(part, skipped=before)
        row = self.nbytes // max(self.row_count, 1)
        return dataclasses.replace(
            part, offset=self.offset + start * row, nbytes=(stop - start) * row
        )

    def squeezed(self) -> StoredTensor:
        """A 1×1 convolution's weight as a linear's."""
        return dataclasses.replace(self, shape=tuple(d for d in self.shape if d != 1))

    def padded(self, columns: int) -> StoredTensor:
        """A linear's weight with columns of zeros behind its own, `columns` in all."""
        rows, own = self.shape
        return dataclasses.replace(self, shape=(rows, columns), padding=columns - own)

    def check_readable(self) -> None:
        """Raise `CheckpointError` for a type that weights are not read from, such as I64."""
        if self.packing is None and self.dtype not in _RAW:
            raise CheckpointError(
                f"Tensor {self.name} in {self.file} is stored as {self.dtype}; "
                f"{', '.join(_RAW)} can be read: save the checkpoint in one of them."
            )

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """The elements `start` to `stop` of the flattened tensor as float32.

        Raises `CheckpointError` for a file that cannot be read, and for NaN and infinity.
        """
        if not self.changes and not self.padding:
            return self._read(start, stop)
        columns = math.prod(self.shape[1:])
        end = math.prod(self.shape) if stop is None else stop
        first = start // columns
        part = self.rows(first, -(-end // columns))
        values = part._unpadded().reshape(part.shape)
        for change in part.changes:
            values = change.add_to(values)
        return values.reshape(-1)[start - first * columns : end - first * columns]

    def _unpadded(self) -> NDArray[np.float32]:
        """All of the checkpoint's own values, with zeros in the columns that it has not."""
        if not self.padding:
            return self._read(0, None)
        rows, columns = self.shape
        own = dataclasses.replace(self, shape=(rows, columns - self.padding), padding=0)
        return np.pad(own._read(0, None).reshape(own.shape), ((0, 0), (0, self.padding)))

    def _read(self, start: int, stop: int | None) -> NDArray[np.float32]:
        """As `read`, of the checkpoint's own values."""
        self.check_readable()
        end = math.prod(self.shape) if stop is None else stop
        exact = self._widened(start, end) if self.packing else self._plain(start, end)
        if self.scale is not None:
            exact = exact * self.scale.read()[0]
        # Its ends instead of a mask of all: NaN and infinity reach them, and no memory is taken.
        if end > start and not (np.isfinite(exact.min()) and np.isfinite(exact.max())):
            raise CheckpointError(
                f"Tensor {self.name} holds NaN or infinity in {self.file}: the checkpoint is "
                "broken. Fetch it again, or merge or convert it again from what it was made of."
            )
        return exact

    def read_bytes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Some bytes of a tensor as they are stored. Raises `CheckpointError` for a cut file."""
        return self._from_file(np.dtype("u1"), self.offset + start, stop - start)

    def _plain(self, start: int, stop: int) -> NDArray[np.float32]:
        raw = np.dtype(_RAW[self.dtype])
        values = self._from_file(raw, self.offset + start * raw.itemsize, stop - start)
        return to_float32(values, self.dtype)

    def _widened(self, start: int, stop: int) -> NDArray[np.float32]:
        """Numbers of packed blocks, some at a time: what widening takes beside them stays small."""
        assert self.packing is not None
        size, width = self.packing.elements, self.packing.block_bytes
        start, stop = start + self.skipped, stop + self.skipped
        values = np.empty(stop - start, np.float32)
        step = max(_WIDENED // size, 1)
        for first in range(start // size, -(-stop // size), step):
            last = min(first + step, -(-stop // size))
            held = self.read_bytes(first * width, min(last * width, self.nbytes))
            # The last block of a tensor need not be whole.
            blocks = np.zeros((last - first, width), np.uint8)
            blocks.reshape(-1)[: held.size] = held
            with np.errstate(over="ignore", invalid="ignore"):
                numbers = self.packing.widen(blocks, first).reshape(-1)
            begin, end = max(start, first * size), min(stop, last * size)
            values[begin - start : end - start] = numbers[begin - first * size : end - first * size]
        return values

    def _from_file(self, raw: np.dtype[Any], offset: int, count: int) -> NDArray[Any]:
        try:
            values = np.fromfile(self.file, raw, count, offset=offset)
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error.strerror}.") from error
        if values.size != count:
            raise CheckpointError(f"{self.file} was cut off while it was read.")
        return values


_WIDENED = 1 << 18
"""Packed numbers that are widened at a time: 1 MB in float32."""

_RAW = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}
"""Types that weights are stored in, as NumPy reads their bits."""

WHOLE_TYPES = ("F32", "F16", "BF16")
"""Types that models are trained in; all others were rounded to."""

Weights = Mapping[str, StoredTensor]
"""The tensors of a network, under the names of the diffusers layout."""


def find_tensor(weights: Weights, name: str, shape: tuple[int, ...]) -> StoredTensor:
    """The tensor under a name of the graphs, held against the shape that a network asks for.

    Raises `CheckpointError` where it is missing, of another shape, or of a type that is not read.
    """
    stored = weights.get(name)
    if stored is None:
        raise CheckpointError(
            f"The checkpoint has no tensor {name}: it is incomplete, or of another architecture."
        )
    if stored.shape != shape:
        raise CheckpointError(
            f"Tensor {stored.name} in {stored.file} has shape {list(stored.shape)}, but the rest "
            f"of the model asks for {list(shape)} ({name})."
        )
    stored.check_readable()
    return stored


@dataclass(frozen=True)
class Index:
    """An index of shards: the file that it is, and each tensor's shard by name."""

    file: Path
    weight_map: Mapping[str, str]

    @property
    def shards(self) -> list[str]:
        """The names of the shards, in order."""
        return sorted(set(self.weight_map.values()))


_ROUNDING = {
    "F32": (0.0, 0.0),
    "F16": (2.0**-11, 2.0**-25),
    "BF16": (2.0**-8, 0.0),
    "F8_E4M3": (2.0**-4, 2.0**-10),
    "F8_E5M2": (2.0**-3, 2.0**-17),
}
"""How far rounding to a type can move a number: as a share of it, and near 0."""


def same_values(one: Weights, other: Weights, most: int | None = None) -> bool:
    """Whether the tensors that both hold are the same, but for rounding to their types.

    Of each tensor the first `most` elements are read, or all. Raises `CheckpointError` for what
    cannot be read.
    """
    for name in one.keys() & other.keys():
        first, second = one[name], other[name]
        if first.shape != second.shape:
            return False
        # Position ids, of integers, are no weights; packed ones were rounded much further.
        if first.dtype not in _ROUNDING or second.dtype not in _ROUNDING:
            continue
        size = math.prod(first.shape)
        count = size if most is None else min(size, most)
        shares, ends = zip(_ROUNDING[first.dtype], _ROUNDING[second.dtype], strict=True)
        if not np.allclose(
            first.read(0, count), second.read(0, count), rtol=sum(shares), atol=sum(ends)
        ):
            return False
    return True


def read_stored(files: Iterable[Path], index: Index | None = None) -> dict[str, StoredTensor]:
    """All tensors of some safetensors or GGUF files as they are stored.

    Raises `CheckpointError` for a broken file, for a tensor that stands in two files, and for
    shards that are not as their index says.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, entry in read_entries(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"Tensor {name} is both in {tensors[name].file} and in {file}: "
                    "move the file that does not belong to the checkpoint to another folder."
                )
            tensors[name] = StoredTensor.of(file, entry)
    if index is not None:
        _hold_against(tensors, index)
    return tensors


def read_entries(file: Path) -> Mapping[str, TensorEntry]:
    """The tensors of a safetensors or GGUF file's header.

    Raises `CheckpointError` for what is neither, and for one that is broken.
    """
    if is_gguf(file):
        return read_gguf(file)
    check_bytes(file)
    return read_header(file).tensors


_EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Names of one tensor of T5."""


def _hold_against(tensors: Mapping[str, StoredTensor], index: Index) -> None:
    """Refuse shards that hold other tensors than their index promises."""
    apart = "the index and the shards are not of one checkpoint. Download both again."
    for name, shard in index.weight_map.items():
        if name not in tensors:
            # Converters list T5's embedding under all its names, and store it under one.
            if name in _EMBEDDING and not tensors.keys().isdisjoint(_EMBEDDING):
                continue
            raise CheckpointError(
                f"{index.file} says that tensor {name} is in {shard}, which does not hold it: "
                f"{apart}"
            )
        found = tensors[name].file.name
        if found != shard:
            raise CheckpointError(
                f"{index.file} says that tensor {name} is in {shard}, and it is in {found}: {apart}"
            )
    for name, tensor in tensors.items():
        if name not in index.weight_map:
            raise CheckpointError(
                f"Tensor {name} in {tensor.file} is not in {index.file.name}: {apart}"
            )


# What ComfyUI stores beside FP8 weights: the scale of each, in an older and a newer spelling; that
# of its input, which only FP8 arithmetic needs; and marks of the format.
_SCALES = (".scale_weight", ".weight_scale")
_BESIDE_FP8 = (".scale_input", ".input_scale", "scaled_fp8", ".comfy_quant")


def attach_scales(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Attach the scales of FP8 weights to them, and drop what only FP8 arithmetic needs.

    Raises `CheckpointError` for a weight with several scales.
    """
    beside = (*_SCALES, *_BESIDE_FP8)
    kept = {name: t for name, t in tensors.items() if not f".{name}".endswith(beside)}
    for name, scale in tensors.items():
        module, _, kind = name.rpartition(".")
        weight = f"{module}.weight"
        if f".{kind}" not in _SCALES or weight not in kept:
            continue
        if math.prod(scale.shape) != 1:
            raise CheckpointError(
                f"Tensor {name} in {scale.file} has shape {list(scale.shape)}; one scale a weight "
                "is read. Use the checkpoint's bfloat16 or plain FP8 file."
            )
        kept[weight] = dataclasses.replace(kept[weight], scale=scale)
    return kept
