"""What a LoRA file holds: for each linear that it changes, two factors and their scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.tensorfile import TensorFile, read_tensor, to_float32
from fluxdeploy.errors import CheckpointError, UsageError

__all__ = [
    "AddedBias",
    "Change",
    "Difference",
    "Linears",
    "Lora",
    "LoraFile",
    "LowRank",
    "NewNorm",
    "adapter_config",
    "parse_lora",
    "read_float32",
]

Linears = Mapping[str, Mapping[str, tuple[int, int]]]
"""The linears of a base model: for each part, `transformer`, `clip` and `t5`, the shape (out, in)
of every linear by its name in the graphs, such as `transformer_blocks.0.attn.to_q`."""


class Difference(Protocol):
    """What a file does to a tensor. `scale` is the file's own, beside a user's strength."""

    @property
    def scale(self) -> float: ...

    def rows(self, start: int, stop: int) -> Difference:
        """The difference of some rows of the tensor."""

    def add_to(self, values: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
        """The tensor's rows as they become with that strength. Raises `CheckpointError`."""


@dataclass(frozen=True)
class LowRank:
    """A change of one linear, W + scale·(up @ down); the file is read when a factor is asked for.

    down_key, up_key: the tensors of the file.
    start, stop: the linear's rows of `up`, which may be those of a fused q, k and v.
    columns: those of `up` that are not all zero in these rows, and so the rows of `down` that
        count: a fused file may hold three small LoRAs beside each other.
    scale: alpha / rank of the file, without the strength that a user asks for.
    width: the linear's inputs; where the file has fewer, the others are not changed.
    """

    file: TensorFile
    down_key: str
    up_key: str
    start: int
    stop: int
    columns: tuple[int, ...]
    scale: float
    width: int

    @property
    def rank(self) -> int:
        """How many columns `up` has, and rows `down`; 0 where the change is none."""
        return len(self.columns)

    def rows(self, start: int, stop: int) -> LowRank:
        """The change of some of the linear's rows."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def down(self) -> NDArray[np.float32]:
        """The factor next to the input: float32 [rank, in]. Raises `CheckpointError`."""
        factor = read_float32(self.file, self.down_key)[list(self.columns)]
        more = self.width - factor.shape[1]
        return np.pad(factor, ((0, 0), (0, more))) if more else np.ascontiguousarray(factor)

    def up(self) -> NDArray[np.float32]:
        """The factor next to the output: float32 [out, rank]. Raises `CheckpointError`."""
        rows = read_float32(self.file, self.up_key)[self.start : self.stop]
        return np.ascontiguousarray(rows[:, list(self.columns)])

    def add_to(self, values: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
        """`values` [rows, in] with the change added.

        Computed in float64, so that it is the same however the rows are cut up.
        """
        delta = self.up().astype(np.float64) @ self.down().astype(np.float64)
        delta *= strength * self.scale
        delta += values
        return delta.astype(np.float32)


@dataclass(frozen=True)
class AddedBias:
    """What is added to a linear's bias: numbers `start` to `stop` of a tensor, times `scale`."""

    file: TensorFile
    key: str
    start: int
    stop: int
    scale: float

    def rows(self, start: int, stop: int) -> AddedBias:
        """What is added to some of the bias's numbers."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def add_to(self, values: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
        """`values` [rows] with it added."""
        added = read_float32(self.file, self.key)[self.start : self.stop].astype(np.float64)
        return (values + strength * self.scale * added).astype(np.float32)


@dataclass(frozen=True)
class NewNorm:
    """A norm's weight that takes the place of the base's, whatever the strength: as in diffusers.

    start, stop: the numbers of the tensor that are meant.
    """

    file: TensorFile
    key: str
    start: int
    stop: int
    scale: float = 1.0

    def rows(self, start: int, stop: int) -> NewNorm:
        """Some of the norm's numbers."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def add_to(self, values: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
        """The file's numbers [rows]."""
        return read_float32(self.file, self.key)[self.start : self.stop]


def adapter_config(path: Path) -> Path | None:
    """Where PEFT's `save_pretrained` has put a file's alpha; None for files of other names."""
    config = path.with_name("adapter_config.json")
    return config if path.name == "adapter_model.safetensors" and config.is_file() else None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file that a user names, and how strongly it is to change the weights."""

    path: Path
    strength: float = 1.0

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, and the one beside it that is read with it."""
        config = adapter_config(self.path)
        return (self.path,) if config is None else (self.path, config)


def parse_lora(text: str, place: Callable[[str], Path]) -> LoraFile:
    """FILE or FILE:SCALE, where what is a file as it stands has no scale.

    place: the path of a file by its name. Raises `UsageError` for a scale that is not finite.
    """
    whole, (name, colon, number) = place(text), text.rpartition(":")
    if not colon or whole.exists():
        return LoraFile(whole)
    try:
        strength = float(number)
    except ValueError:
        return LoraFile(whole)
    if not math.isfinite(strength):
        raise UsageError(f"{text!r} has the scale {number}; a finite number is needed.")
    return LoraFile(place(name), strength)


@dataclass(frozen=True)
class Change:
    """What the file with this SHA-256 does to a tensor, merged with that strength."""

    difference: Difference
    strength: float
    sha256: str

    def rows(self, start: int, stop: int) -> Change:
        """The change of some of the tensor's rows."""
        return replace(self, difference=self.difference.rows(start, stop))

    def add_to(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The tensor's rows with the change: a weight's [rows, in], or a vector's [rows]."""
        return self.difference.add_to(values, self.strength)


@dataclass(frozen=True)
class Lora:
    """A LoRA file that was read: `changes` by part, then by the linear's name in the graphs.

    left_out: the parts that it changes too, and that its reader asked to go without. biases: what
    is added to those of linears, by part and linear. norms: of the transformer, by name. reads: the
    channels of a token that the LoRA takes, where they are more than the base's.
    """

    path: Path
    changes: Mapping[str, Mapping[str, LowRank]]
    left_out: tuple[str, ...] = ()
    biases: Mapping[str, Mapping[str, AddedBias]] = field(default_factory=dict)
    norms: Mapping[str, NewNorm] = field(default_factory=dict)
    reads: int | None = None


def read_float32(file: TensorFile, key: str) -> NDArray[np.float32]:
    """A tensor of a LoRA file as float32: F64 is met there too.

    Raises `CheckpointError` for a file that was cut off, for other types, and for NaN and infinity.
    """
    dtype = file.tensors[key].dtype
    raw: NDArray[Any] = read_tensor(file, key)
    try:
        with np.errstate(over="ignore"):
            values = raw.astype(np.float32) if dtype == "F64" else to_float32(raw, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"Tensor {key} of {file.path} cannot be used: {error}") from None
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"Tensor {key} of {file.path} holds NaN or infinity: the LoRA is broken. "
            "Fetch or train it again."
        )
    return values
