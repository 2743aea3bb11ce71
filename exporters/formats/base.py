"""What a number format is: how it stores a weight, what a product looks like, and the way back.

Graphs are of standard ONNX operators in the forms that TensorRT fuses and ONNX Runtime reads. A
format is added by a module with a `Format` and its place in `exporters.formats.FORMATS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from exporters.formats.graph_edit import GraphEdit
from exporters.formats.graph_file import GraphFile, read_values, values_of
from exporters.formats.number_types import EightBits, NumberType
from fluxdeploy.bundle.tensorfile import from_float32

__all__ = ["Activations", "Format", "Packed", "Part", "QuantizedLinear", "lost", "unchanged"]

Activations = Literal["static", "dynamic"] | None
"""How the input of a linear is quantized, as in `fluxdeploy.precision.Quantization`."""

_WIDENED, _MULTIPLE = 1 << 19, 32
"""Numbers that are widened at a time, and of what the parts are multiples: of blocks."""

_ROWS = 256
"""Rows that `emulate_weight` packs at a time, an even number: little memory beside the weight."""

_STORED = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
}


@dataclass(frozen=True)
class Part:
    """One of the tensors that a weight is stored as: its scales, say. All are graph parameters.

    suffix: what its name has after the weight's name; nothing for the weight's own numbers.
    numbers: its type; None where it has that of the product.
    """

    suffix: str
    shape: tuple[int, ...]
    numbers: NumberType | None = None


@dataclass(frozen=True)
class Format(ABC):
    """How numbers are stored in few bits.

    name: as in `fluxdeploy.precision.Quantization.format`.
    numbers: the type of a weight's numbers. No other format has the same one: a graph's weights are
        told by it.
    activations: what the input of a linear may be quantized with; None for weights alone.
    attention: the type that Q, K, V and the softmax's output are quantized to.
    opsets, ir_version: what its operators need of a graph, beyond what traces have.
    """

    name: str
    numbers: NumberType
    activations: tuple[Activations, ...]
    attention: EightBits
    opsets: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    ir_version: int = field(default=0, kw_only=True)

    @abstractmethod
    def layout(self, rows: int, columns: int) -> tuple[Part, ...]:
        """What a weight [rows, columns] is stored as; its own numbers, transposed, come first.

        There may be more of them along the inner axis than columns, where a format takes only some
        numbers at once: the others are zeros.
        """

    def problem(self, rows: int, columns: int) -> str | None:
        """Why a linear with a weight [rows, columns] cannot be had, and what to do; None if not."""
        return None

    @abstractmethod
    def pack(
        self,
        parts: Iterable[NDArray[np.float32]],
        shape: tuple[int, int],
        scales: ir.DataType,
        name: str,
        largest: Callable[[], float],
    ) -> Iterable[NDArray[np.uint8]]:
        """A linear's weight [out, in] as the raw bytes of each part of its layout.

        `parts` are the weight's rows in order, an even number at a time but for the last; they are
        overwritten. `scales` is the type of the product, `name` the weight's name for messages.
        `largest` gives the largest magnitude of the weight, or of the several that share a scale;
        they are read for it. Raises `CheckpointError` for a weight that is not finite, or that the
        scales cannot hold.
        """

    @abstractmethod
    def multiply(
        self,
        edit: GraphEdit,
        product: ir.Node,
        weight: ir.Value,
        activations: Activations,
        largest: Callable[[], float],
    ) -> Packed:
        """Rewrite x · Wᵀ, a MatMul, where the parameter `weight` [out, in] is W.

        `activations` is one of the format's. `largest` gives the largest magnitude of x that was
        measured, for static scales. Raises `ExportError` where it is not known.
        """

    @abstractmethod
    def read(self, file: GraphFile, weight: TensorProto) -> QuantizedLinear:
        """The linear whose weight this is.

        Raises `LookupError`, `TypeError` or `ValueError` for a graph in another form than that of
        `multiply`.
        """

    @abstractmethod
    def widen(self, *parts: Tensor) -> Tensor:
        """The weight [in, out] that a graph multiplies with, of the values of its parts.

        `in` is that of the parts, with what they have more than the linear's input.
        """

    @abstractmethod
    def emulate_input(self, x: Tensor, activations: Activations, largest: float) -> Tensor:
        """What `multiply` makes of a linear's input [..., in], float32 to float32.

        `activations` is one of the format's. `largest` is the largest magnitude of such inputs that
        was measured, for static scales, which are float32 here.
        """

    def emulate_weight(self, weight: Tensor, scales: ir.DataType) -> Tensor:
        """The float32 values [out, in] that a graph multiplies with for a float32 weight [out, in].

        `scales` is the type of the product. The weight shares no scale with others. Raises
        `CheckpointError` as `pack` does.
        """
        rows, columns = weight.shape
        # Copies, since they are overwritten.
        values = weight.detach().numpy()
        parts = (values[start : start + _ROWS].copy() for start in range(0, rows, _ROWS))

        def largest() -> float:
            return max(abs(end.item()) for end in weight.aminmax())

        packed = self.pack(parts, (rows, columns), scales, "of a linear", largest)
        found = torch.empty(self.layout(rows, columns)[0].shape)
        for start, part in self.widened(packed, (rows, columns), scales):
            found[start : start + len(part)] = part
        return found[:columns].T

    def widened(
        self, packed: Iterable[NDArray[np.uint8]], shape: tuple[int, int], scales: ir.DataType
    ) -> Iterator[tuple[int, Tensor]]:
        """What `widen` gives of the bytes of a weight [out, in]: places and parts [some, out].

        A part of the inner axis at a time, since numbers take four to eight times their bytes.
        """
        parts = [*zip(packed, self.layout(*shape), strict=False)]
        inner, rows = parts[0][1].shape
        some = max(_WIDENED // rows // _MULTIPLE, 1) * _MULTIPLE
        for start in range(0, inner, some):
            stop = min(start + some, inner)
            values = []
            for raw, part in parts:
                kept = part.shape
                if len(kept) == 2:  # along the inner axis too
                    first, last = (end * kept[0] // inner for end in (start, stop))
                    raw, kept = raw.reshape(kept[0], -1)[first:last], (last - first, kept[1])
                dtype = part.numbers.onnx_type if part.numbers else scales
                values.append(values_of(raw, dtype, kept))
            yield start, self.widen(*values)

    @property
    def takes_moments(self) -> bool:
        """Whether a weight's numbers make up for each other's rounding: see `moments`."""
        return False

    def informed(self, moments: NDArray[np.uint8] | None) -> Format:
        """The format for a linear of whose input these moments are known."""
        return self

    @property
    def smooths(self) -> bool:
        """Whether an input has one scale for all channels, so that outlying ones cost the rest."""
        return False

    @property
    def shares_scales(self) -> bool:
        """Whether weights with the same input have one scale, so that they are packed together."""
        return False

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of a weight's further parts have after its own name."""
        return tuple(part.suffix for part in self.layout(0, 0)[1:])

    def nbytes(self, shape: tuple[int, ...], scale_width: int) -> int:
        """What a weight [out, in] takes, where the product's type has `scale_width` bytes."""
        rows, columns = shape
        bits = 0
        for part in self.layout(rows, columns):
            width = part.numbers.bits if part.numbers else 8 * scale_width
            bits += width * math.prod(part.shape)
        return bits // 8

    def declare(self, edit: GraphEdit, weight: ir.Value, scales: ir.DataType) -> list[ir.Value]:
        """Give a parameter [out, in] the type and shape that is stored, and the graph its scales.

        Returns the latter. `scales` is the type of those that have the product's.
        """
        assert weight.shape is not None
        rows, columns = weight.shape.numpy()
        numbers, *others = self.layout(rows, columns)
        # The stored bytes are those of the transposed matrix: the product takes them as they are.
        weight.type = ir.TensorType(self.numbers.onnx_type)
        weight.shape = ir.Shape(numbers.shape)
        return [
            edit.parameter(
                f"{weight.name}{part.suffix}",
                part.shape,
                part.numbers.onnx_type if part.numbers else scales,
            )
            for part in others
        ]


@dataclass(frozen=True)
class Packed:
    """How a weight [out, in] of a graph is stored.

    scales: the type of those of its scales that have the product's.
    group: weights of one group have a scale in common, so that an engine can merge their products;
        one without a name is of none.
    factors: what the channels of its input are multiplied with, float32 [in]; its columns are
        divided by them. None where they are not.
    vector: name and type of the parameter that has these factors, where this weight is the one
        that it is stored with.
    mean: of each channel of its input, float32 [in], for the linear's bias: see `lost`. None where
        it is not known.
    """

    format: Format
    scales: ir.DataType
    group: str = ""
    factors: NDArray[np.float32] | None = field(default=None, compare=False)
    vector: tuple[str, ir.DataType] | None = None
    mean: NDArray[np.float32] | None = field(default=None, compare=False)

    @property
    def dtype(self) -> str:
        """The safetensors type of its numbers."""
        return self.format.numbers.stored

    def declarations(
        self, name: str, rows: int, columns: int
    ) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, safetensors type and shape of all that a weight [rows, columns] is stored as."""
        scales = _STORED[self.scales]
        declared = [
            (name + part.suffix, part.numbers.stored, part.numbers.stored_shape(part.shape))
            if part.numbers
            else (name + part.suffix, scales, part.shape)
            for part in self.format.layout(rows, columns)
        ]
        if self.vector is not None:
            vector, dtype = self.vector
            declared.append((vector, _STORED[dtype], (columns,)))
        return declared

    def pack(
        self,
        parts: Iterable[NDArray[np.float32]],
        shape: tuple[int, int],
        name: str,
        largest: Callable[[], float],
    ) -> Iterable[NDArray[np.uint8]]:
        """The raw bytes of what `declarations` lists: see `Format.pack`."""
        factors = self.factors
        if factors is None:
            return self.format.pack(parts, shape, self.scales, name, largest)
        divided = (np.divide(part, factors, out=part) for part in parts)
        packed = [*self.format.pack(divided, shape, self.scales, name, largest)]
        if self.vector is not None:
            packed.append(from_float32(factors, _STORED[self.vector[1]]).view(np.uint8))
        return packed

    def mean_product(
        self, packed: Iterable[NDArray[np.uint8]], shape: tuple[int, int]
    ) -> NDArray[np.float32]:
        """What a graph's product is in the mean, [out], of the bytes of a weight [out, in]."""
        assert self.mean is not None
        rows, columns = shape
        mean = torch.zeros(self.format.layout(rows, columns)[0].shape[0])
        factors = 1 if self.factors is None else self.factors
        mean[:columns] = torch.from_numpy(self.mean * factors)
        total = torch.zeros(rows)
        for start, part in self.format.widened(packed, shape, self.scales):
            total += mean[start : start + len(part)] @ part
        return total.numpy()


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear as an exported graph has it.

    parts: the initializers that its weight is stored as, in the order of the format's layout.
        External data lies below `folder`.
    narrow: what the graph does to the linear's input, float32 to float32.
    bias: the initializer that is added to the product, None where there is none.
    """

    format: Format
    parts: Sequence[TensorProto]
    narrow: Callable[[Tensor], Tensor]
    folder: Path
    bias: TensorProto | None = None

    def fits(self, rows: int, columns: int) -> bool:
        """Whether it has the shapes of a weight [rows, columns]."""
        expected = [list(part.shape) for part in self.format.layout(rows, columns)]
        return [list(part.dims) for part in self.parts] == expected

    def dequantized(self) -> Tensor:
        """The weight [in, out] that the graph multiplies with, float32, read from its file.

        `in` is that of what `narrow` gives.
        """
        return self.format.widen(*(read_values(part, self.folder) for part in self.parts))

    def added(self) -> Tensor | float:
        """What the graph adds to the product, float32 [out], read from its file."""
        return 0.0 if self.bias is None else read_values(self.bias, self.folder)


def lost(weight: Tensor, rounded: Tensor, factors: Tensor | None, mean: Tensor) -> Tensor:
    """What the rounding of a weight [out, in] takes from a product in the mean, [out].

    M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019,
    equation 16: (W - Ŵ) E[x]. The channels of `mean` are those of the input before it is multiplied
    with `factors`, by which the weight was divided.
    """
    narrow = mean if factors is None else mean * factors
    return weight @ mean - rounded @ narrow


def unchanged(x: Tensor) -> Tensor:
    """What a graph does to the input of a linear whose weight alone is quantized: nothing."""
    return x
