"""INT4: numbers from -8 to 7, with a scale for every 32 of them.

All of a block's steps are as wide, so that its scale decides what is lost. The one that holds the
largest value without cutting it off is seldom the best: a value that is cut off a little may cost
less than wider steps cost all the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from exporters.formats.base import Activations, Format, Packed, Part, QuantizedLinear, unchanged
from exporters.formats.fp8 import E4M3
from exporters.formats.graph_edit import GraphEdit, new_node
from exporters.formats.graph_file import GraphFile
from exporters.formats.moments import BLOCK, decode_moments, error_factors
from exporters.formats.number_types import SCALE_SUFFIX, NumberType
from exporters.formats.scales import SCALE_TYPES, check_finite, check_scales

__all__ = ["INT4"]

_BLOCK = BLOCK
"""Numbers that share a scale, and make up for each other's rounding. ONNX Runtime, OpenVINO and
TensorRT-RTX have products for 16 to 128. Twice as many to a scale save a quarter of a bit and cost
0.8 to 1.6 dB; and networks whose widths are no multiples of 64 are not rare."""

_LOWEST, _HIGHEST = -8, 7

_REACHES = (1.0, 0.93, 0.86)
"""Which parts of a block's range are tried. More of them gain less than 0.1 dB."""


@dataclass(frozen=True)
class _Int4(Format):
    """Weights in blocks along a product's inner axis; their inputs stay as they are.

    Two codes a byte [in, out / 2], the first in the low bits, and scales [in / 32, out] with
    weight ≈ (codes · scales)ᵀ. A scale is that of the least squared error among some that are
    tried; it is rounded to its type before it divides. `out` is even. Where `in` is no multiple of
    32, as all of FLUX.1 are, zeros are appended to both sides of the product up to the next one:
    ONNX and its Runtime know a last block that is shorter, OpenVINO does not.

    moments: of the input, as `encode_moments` has them, where they are known: then the numbers of a
        block make up for each other's rounding.
    """

    moments: NDArray[np.uint8] | None = field(default=None, compare=False, kw_only=True)

    @property
    def takes_moments(self) -> bool:
        return True

    def informed(self, moments: NDArray[np.uint8] | None) -> Format:
        return replace(self, moments=moments)

    def layout(self, rows: int, columns: int) -> tuple[Part, ...]:
        blocks = math.ceil(columns / _BLOCK)
        return (
            Part("", (blocks * _BLOCK, rows), self.numbers),
            Part(SCALE_SUFFIX, (blocks, rows)),
        )

    def problem(self, rows: int, columns: int) -> str | None:
        if not rows % 2:
            return None
        return f"gives {rows} numbers; INT4 needs a multiple of 2. Use int8-weights."

    def pack(
        self,
        parts: Iterable[NDArray[np.float32]],
        shape: tuple[int, int],
        scales: ir.DataType,
        name: str,
        largest: Callable[[], float],
    ) -> tuple[NDArray[np.uint8], ...]:
        rows, columns = shape
        blocks = math.ceil(columns / _BLOCK)
        codes = np.empty((blocks * _BLOCK, rows // 2), np.uint8)
        steps = torch.empty(blocks, rows, dtype=SCALE_TYPES[scales])
        factors = None
        if self.moments is not None:
            factors = error_factors(decode_moments(self.moments, columns))
        peak = torch.zeros(())
        end = 0
        for part in parts:
            start, end = end, end + len(part)
            # Transposed first: sums over a block are then sums of whole rows.
            values = _padded(torch.from_numpy(part), blocks * _BLOCK).t().contiguous()
            split = values.view(blocks, _BLOCK, len(part))
            low, high = split.amin(1), split.amax(1)
            peaks = torch.maximum(high, -low)
            check_finite(peaks, name)
            peak = torch.maximum(peak, peaks.max())
            range_step = torch.maximum(low / _LOWEST, high / _HIGHEST)
            exact = None if factors is None else split.clone()
            fitted = _divide(split, range_step, steps.dtype)
            if exact is not None and factors is not None:
                _make_up(exact, fitted, factors, split)
            steps[:, start:end] = fitted
            numbers = values.to(torch.int8).view(torch.uint8)
            pairs = numbers[:, ::2] & 15 | numbers[:, 1::2] << 4
            torch.from_numpy(codes)[:, start // 2 : end // 2] = pairs
        check_scales(steps, peak, name)
        return codes, steps.view(torch.uint8).numpy()

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
        assert weight.shape is not None
        columns = weight.shape.numpy()[1]
        (scales,) = self.declare(edit, weight, compute)
        blocks = {"axis": 0, "block_size": _BLOCK}
        wide = edit.before(product, "DequantizeLinear", [weight, scales], compute, "weight", blocks)
        product.replace_input_with(1, wide)
        if missing := -columns % _BLOCK:
            (longer,) = edit.once(x, lambda: (_append_zeros(edit, x, missing),))
            product.replace_input_with(0, longer)
        return Packed(self, compute)

    def read(self, file: GraphFile, weight: TensorProto) -> QuantizedLinear:
        (reader,) = file.users[weight.name]
        scales = file.initializers[reader.input[1]]
        (product,) = file.users[reader.output[0]]
        source = file.producers.get(product.input[0])
        narrow: Callable[[Tensor], Tensor] = unchanged
        if source is not None and source.op_type == "Pad":
            narrow = partial(_padded, width=weight.dims[0])
        return QuantizedLinear(self, (weight, scales), narrow, file.folder)

    def widen(self, *parts: Tensor) -> Tensor:
        numbers, scales = parts
        return numbers * scales.repeat_interleave(_BLOCK, 0)

    def emulate_input(self, x: Tensor, activations: Activations, largest: float) -> Tensor:
        return x


def _padded(x: Tensor, width: int) -> Tensor:
    """`x` [..., some] with zeros after it, [..., width]."""
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _append_zeros(edit: GraphEdit, value: ir.Value, count: int) -> ir.Value:
    """A product's input with `count` zeros more along its last axis."""
    compute = value.dtype
    assert compute is not None
    counts = edit.constant(f"{value.name}.padding", [0, count], ir.DataType.INT64)
    axis = edit.constant(f"{value.name}.padded_axis", [-1], ir.DataType.INT64)
    outputs = {f"{value.name}.padded": compute}
    node = new_node("Pad", [value, counts, None, axis], outputs, f"{value.name}/Pad")
    edit.after(value, node)
    return node.outputs[0]


def _divide(blocks: Tensor, range_steps: Tensor, scale_type: torch.dtype) -> Tensor:
    """Turn blocks [in / 32, 32, some] into their numbers, and return their scales [in / 32, some].

    `range_steps` are the scales with which nothing is cut off. For each reach, numbers are rounded
    with that part of them; the scale that fits these numbers best then is their least squares'.
    """
    least = torch.finfo(scale_type).tiny
    whole = range_steps.clamp_(min=least)
    # In steps, so that no square is too large or too small for float32.
    blocks /= whole[:, None]
    steps, gains = whole.to(scale_type).float(), torch.zeros_like(whole)
    numbers, products = torch.empty_like(blocks), torch.empty_like(blocks)
    for reach in _REACHES:
        torch.mul(blocks, 1 / reach, out=numbers).round_().clamp_(_LOWEST, _HIGHEST)
        matched = _sum(torch.mul(numbers, blocks, out=products))
        power = torch.mul(numbers, numbers, out=products).sum(1)  # of integers: exact
        fitted = (matched / power.clamp_(min=1)).mul_(whole).clamp_(min=least)
        fitted = fitted.to(scale_type).float()
        # By how much the squared error is less than with zeros.
        share = fitted / whole
        gain = share * (2 * matched - share * power)
        better = gain > gains
        steps, gains = torch.where(better, fitted, steps), torch.where(better, gain, gains)
    blocks *= (whole / steps)[:, None]
    blocks.round_().clamp_(_LOWEST, _HIGHEST)
    return steps


def _make_up(left: Tensor, steps: Tensor, factors: Tensor, numbers: Tensor) -> None:
    """Round blocks `left` [in / 32, 32, some], each number with the errors before it in mind.

    `steps` [in / 32, some] are their scales, `factors` those of `error_factors`. Writes `numbers`;
    `left` is overwritten.
    """
    for i in range(_BLOCK):
        torch.div(left[:, i], steps, out=numbers[:, i])
        numbers[:, i].round_().clamp_(_LOWEST, _HIGHEST)
        error = left[:, i] - numbers[:, i] * steps
        left[:, i + 1 :] -= factors[:, i, i + 1 :, None] * error[:, None]


def _sum(products: Tensor) -> Tensor:
    """Sums over blocks [in / 32, 32, some], which are overwritten.

    In an order that does not depend on how many rows come at a time, as torch's own does.
    """
    width = products.shape[1]
    while width > 1:
        width //= 2
        products[:, :width] += products[:, width : 2 * width]
    return products[:, 0].clone()


INT4 = _Int4(
    "int4",
    NumberType("U8", ir.DataType.INT4, each=2),
    activations=(None,),
    # No runtime has an attention in INT4.
    attention=E4M3,
)
