"""Where a weight's bytes lie: contiguous rows of a tensor in a safetensors file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.tensorfile import TensorEntry, read_header, to_float32
from fluxdeploy.errors import CheckpointError

__all__ = ["StoredTensor", "Weights", "find_tensor", "read_tensors"]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, or contiguous rows of one, in a safetensors file.

    `offset` is in bytes from the start of the file. `scale` is the scalar that an FP8 checkpoint
    multiplies the stored values with.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    scale: StoredTensor | None = None

    @classmethod
    def of(cls, file: Path, entry: TensorEntry) -> StoredTensor:
        """The whole of a tensor."""
        return cls(file, entry.name, entry.dtype, entry.shape, entry.offset, entry.nbytes)

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
        row = self.nbytes // max(self.row_count, 1)
        return dataclasses.replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * row,
            nbytes=(stop - start) * row,
        )

    def squeezed(self) -> StoredTensor:
        """A 1×1 convolution's weight as a linear's."""
        return dataclasses.replace(self, shape=tuple(d for d in self.shape if d != 1))

    def check_readable(self) -> None:
        """Raise `CheckpointError` for a type that weights are not read from, such as I64."""
        if self.dtype not in _RAW:
            raise CheckpointError(
                f"Tensor {self.name} in {self.file} is stored as {self.dtype}; "
                f"{', '.join(_RAW)} can be read."
            )

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """The elements `start` to `stop` of the flattened tensor as float32."""
        self.check_readable()
        raw = np.dtype(_RAW[self.dtype])
        count = (math.prod(self.shape) if stop is None else stop) - start
        try:
            values = np.fromfile(self.file, raw, count, offset=self.offset + start * raw.itemsize)
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error.strerror}.") from error
        if values.size != count:
            raise CheckpointError(f"{self.file} was cut off while it was read.")
        exact = to_float32(values, self.dtype)
        return exact if self.scale is None else exact * self.scale.read()[0]


_RAW = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}
"""Types that weights are stored in, as NumPy reads their bits."""

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


def read_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of some safetensors files, with the scales of FP8 checkpoints attached.

    Raises `CheckpointError` for a broken file and for a tensor that stands in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, entry in read_header(file).tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"Tensor {name} is both in {tensors[name].file} and in {file}: "
                    "move the file that does not belong to the checkpoint to another folder."
                )
            tensors[name] = StoredTensor.of(file, entry)
    return _with_scales(tensors)


# What ComfyUI stores beside FP8 weights: the scale of each, in an older and a newer spelling; that
# of its input, which only FP8 arithmetic needs; and marks of the format.
_SCALES = (".scale_weight", ".weight_scale")
_BESIDE_FP8 = (".scale_input", ".input_scale", "scaled_fp8", ".comfy_quant")


def _with_scales(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Attach the scales of FP8 weights to them, and drop what only FP8 arithmetic needs."""
    kept = {n: t for n, t in tensors.items() if not n.endswith((*_SCALES, *_BESIDE_FP8))}
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
