"""Weights in 8 bits: one scale for each row of a linear, and the rows as 8-bit numbers.

The scales have the type that the product computes in: with float32 scales in a 16-bit graph
TensorRT keeps the 16-bit kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from exporters.formats.base import Activations, Format, Packed, Part, QuantizedLinear, unchanged
from exporters.formats.graph_edit import GraphEdit
from exporters.formats.graph_file import GraphFile
from exporters.formats.number_types import SCALE_SUFFIX, EightBits
from exporters.formats.scales import SCALE_TYPES, check_finite, check_scales

__all__ = ["RowScaled"]


@dataclass(frozen=True)
class RowScaled(Format):
    """Weights in 8 bits with a scale a row, and inputs in the same type with one static scale.

    Bytes [in, out] and scales [out] with weight ≈ bytesᵀ · scales. A row's scale maps its largest
    value to the largest of the type and is rounded to the type of scales first, so that the bytes
    are those that fit it best.
    """

    numbers: EightBits

    @property
    def smooths(self) -> bool:
        return True

    def layout(self, rows: int, columns: int) -> tuple[Part, ...]:
        return Part("", (columns, rows), self.numbers), Part(SCALE_SUFFIX, (rows,))

    def pack(
        self,
        parts: Iterable[NDArray[np.float32]],
        shape: tuple[int, int],
        scales: ir.DataType,
        name: str,
        largest: Callable[[], float],
    ) -> tuple[NDArray[np.uint8], ...]:
        rows, columns = shape
        numbers, scale_type = self.numbers, SCALE_TYPES[scales]
        # NumPy has no bfloat16 and no FP8: bytes pass for all of them.
        narrow = np.empty((columns, rows), np.uint8)
        peaks, steps = torch.empty(rows), torch.empty(rows, dtype=scale_type)
        end = 0
        for part in parts:
            values = torch.from_numpy(part)
            start, end = end, end + len(part)
            peak = torch.maximum(values.amax(1), -values.amin(1))
            check_finite(peak, name)
            step = (peak / numbers.largest).clamp(min=torch.finfo(scale_type).tiny)
            step = torch.where(peak > 0, step, 1).to(scale_type)
            values /= step.float()[:, None]
            if not numbers.torch_type.is_floating_point:
                values.round_()
            # No quotient is past the type's end by more than a scale's rounding, 1/512, and rounds
            # to it.
            rounded = values.to(numbers.torch_type).view(torch.uint8)
            # Transposed on its own first, which torch does in blocks that fit the cache.
            torch.from_numpy(narrow)[:, start:end] = rounded.t().contiguous()
            peaks[start:end], steps[start:end] = peak, step
        check_scales(steps, peaks.max(), name)
        return narrow, steps.view(torch.uint8).numpy()

    def multiply(
        self,
        edit: GraphEdit,
        product: ir.Node,
        weight: ir.Value,
        activations: Activations,
        largest: Callable[[], float],
    ) -> Packed:
        x, compute = product.inputs[0], weight.dtype
        assert x is not None
        assert compute is not None
        (scales,) = self.declare(edit, weight, compute)
        wide = edit.before(
            product, "DequantizeLinear", [weight, scales], compute, "weight", {"axis": 1}
        )
        product.replace_input_with(1, wide)
        if activations == "static":
            (narrow,) = edit.once(
                x, lambda: (self.numbers.narrow(edit, x, self.numbers.headroom * largest()),)
            )
            product.replace_input_with(0, narrow)
        return Packed(self, compute)

    def read(self, file: GraphFile, weight: TensorProto) -> QuantizedLinear:
        (reader,) = file.users[weight.name]
        scales = file.initializers[reader.input[1]]
        (product,) = file.users[reader.output[0]]
        source = file.producers.get(product.input[0])
        narrow: Callable[[Tensor], Tensor] = unchanged
        if source is not None and source.op_type == "DequantizeLinear":
            narrow = partial(self.numbers.emulate, scale=file.scale(source))
        return QuantizedLinear(self, (weight, scales), narrow, file.folder)

    def widen(self, *parts: Tensor) -> Tensor:
        numbers, scales = parts
        return numbers * scales

    def emulate_input(self, x: Tensor, activations: Activations, largest: float) -> Tensor:
        if activations is None:
            return x
        step = self.numbers.step(self.numbers.headroom * largest, ir.DataType.FLOAT)
        return self.numbers.emulate(x, step)
