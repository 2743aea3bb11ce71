"""NVFP4: E2M1 numbers, an E4M3 scale for every 16 of them, a float32 scale for all.

E2M1 has a sign, two bits of exponent and one of fraction: 0, 0.5, 1, 1.5, 2, 3, 4 and 6, which are
codes 0 to 7, with 8 added for the sign (OCP Microscaling Formats, 5.3.3).

Graphs take one operator that is TensorRT's own, since ONNX has none that makes scales of blocks:
TRT_FP4DynamicQuantize(x, g) gives E2M1 numbers q and E4M3 block scales s with x = q · s · g.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from exporters.formats.base import Activations, Format, Packed, Part, QuantizedLinear
from exporters.formats.fp8 import E4M3
from exporters.formats.graph_edit import GraphEdit, new_node
from exporters.formats.graph_file import GraphFile
from exporters.formats.number_types import SCALE_SUFFIX, NumberType
from exporters.formats.scales import check_finite

__all__ = ["NVFP4"]

_BLOCK = 16
"""Numbers that share a scale."""

_GLOBAL_SCALE_SUFFIX = ".global_scale"

_LARGEST, _LEAST_SCALE = 6.0, 2.0**-9
_LARGEST_PRODUCT = _LARGEST * E4M3.largest
"""The largest number with the largest block scale."""

_SINGLE = ir.DataType.FLOAT
_E2M1 = NumberType("F4", ir.DataType.FLOAT4E2M1)
_FLOAT32 = NumberType("F32", _SINGLE)

_TENSORRT = "trt"
"""The domain of TensorRT's own operators."""


@dataclass(frozen=True)
class _Nvfp4(Format):
    """Weights and inputs in blocks along a product's inner axis, since no product takes one alone.

    Of a weight there are two codes a byte [in, out / 2], the first in the low bits; block scales
    [in / 16, out]; and the scale for all of them. weight ≈ (codes · block scales · scale)ᵀ. A
    block's scale maps its largest number to the largest of E2M1 and is rounded to E4M3 before the
    numbers are. The scale for all maps the largest magnitude of the weights that share it to the
    largest of both types. `in` is a multiple of 16, `out` is even.
    """

    @property
    def shares_scales(self) -> bool:
        return True

    def layout(self, rows: int, columns: int) -> tuple[Part, ...]:
        return (
            Part("", (columns, rows), self.numbers),
            Part(SCALE_SUFFIX, (columns // _BLOCK, rows), E4M3),
            Part(_GLOBAL_SCALE_SUFFIX, (), _FLOAT32),
        )

    def problem(self, rows: int, columns: int) -> str | None:
        if not columns % _BLOCK and not rows % 2:
            return None
        return (
            f"takes {columns} numbers and gives {rows}; FP4 needs multiples of {_BLOCK} and 2. "
            "Use fp8."
        )

    def pack(
        self,
        parts: Iterable[NDArray[np.float32]],
        shape: tuple[int, int],
        scales: ir.DataType,
        name: str,
        largest: Callable[[], float],
    ) -> tuple[NDArray[np.uint8], ...]:
        rows, columns = shape
        whole = torch.tensor(largest()) / _LARGEST_PRODUCT
        whole = whole.clamp(min=torch.finfo(torch.float32).tiny)
        codes = np.empty((columns, rows // 2), np.uint8)
        steps = np.empty((columns // _BLOCK, rows), np.uint8)
        end = 0
        for part in parts:
            values = torch.from_numpy(part)
            start, end = end, end + len(part)
            blocks = values.view(len(part), -1, _BLOCK)
            peaks = torch.maximum(blocks.amax(2), -blocks.amin(2))
            check_finite(peaks, name)
            # A block scale of 0 would divide by it, and engines refuse it.
            exact = (peaks / _LARGEST / whole).clamp(_LEAST_SCALE, E4M3.largest)
            narrow = exact.to(E4M3.torch_type)
            blocks /= (narrow.float() * whole)[:, :, None]
            torch.from_numpy(steps)[:, start:end] = narrow.view(torch.uint8).t()
            rounded = _codes(values)
            pairs = rounded[::2] | rounded[1::2] << 4
            # Transposed on its own first, which torch does in blocks that fit the cache.
            torch.from_numpy(codes)[:, start // 2 : end // 2] = pairs.t().contiguous()
        return codes, steps, whole.reshape(1).view(torch.uint8).numpy()

    def multiply(
        self,
        edit: GraphEdit,
        product: ir.Node,
        weight: ir.Value,
        activations: Activations,
        largest: Callable[[], float],
    ) -> Packed:
        x, compute = product.inputs[0], product.outputs[0].dtype
        assert x is not None
        assert compute is not None
        scales, one = self.declare(edit, weight, compute)
        steps = edit.before(product, "DequantizeLinear", [scales, one], _SINGLE, "scales")
        if compute != _SINGLE:
            to = {"to": compute.value}
            steps = edit.before(product, "Cast", [steps], compute, "scales", to)
        blocks = {"axis": 0, "block_size": _BLOCK}
        wide = edit.before(product, "DequantizeLinear", [weight, steps], compute, "weight", blocks)
        product.replace_input_with(1, wide)
        # Block scales are E4M3, which a scale for all that is too large costs as little.
        (narrow,) = edit.once(x, lambda: (_narrow(edit, x, E4M3.headroom * largest()),))
        product.replace_input_with(0, narrow)
        return Packed(self, compute, str(x.name))

    def read(self, file: GraphFile, weight: TensorProto) -> QuantizedLinear:
        (reader,) = file.users[weight.name]
        (product,) = file.users[reader.output[0]]
        steps, whole = (file.initializers[name] for name in _scales(file, reader).input)
        x = file.producers[product.input[0]]
        narrow = partial(_emulate, scale=file.scale(_scales(file, x)))
        return QuantizedLinear(self, (weight, steps, whole), narrow, file.folder)

    def widen(self, *parts: Tensor) -> Tensor:
        numbers, scales, whole = parts
        return numbers * (scales * whole).repeat_interleave(_BLOCK, 0)

    def emulate_input(self, x: Tensor, activations: Activations, largest: float) -> Tensor:
        return _emulate(x, _input_scale(E4M3.headroom * largest))


def _codes(values: Tensor) -> Tensor:
    """Codes of float32 numbers, rounded to the nearest, of two the even one.

    Codes 0 to 4 are 0.5 apart, 4 to 6 are 1, 6 and 7 are 2. In each of these parts its own line is
    the lowest of the three.
    """
    size = values.abs()
    codes = (2 * size).round_()
    torch.minimum(codes, size.round().add_(2), out=codes)
    torch.minimum(codes, (size / 2).round_().add_(4), out=codes)
    return codes.clamp_(max=7).to(torch.uint8) | values.signbit().to(torch.uint8) << 3


def _input_scale(largest: float) -> float:
    """The scale for all of an input that maps `largest` to the largest number with a scale."""
    least = float(np.finfo(np.float32).smallest_normal)
    return max((largest or 1.0) / _LARGEST_PRODUCT, least)


def _narrow(edit: GraphEdit, value: ir.Value, largest: float) -> ir.Value:
    """`value` in blocks and back. `largest` maps to the largest number with a scale.

    What is larger is cut off.
    """
    compute = value.dtype
    assert compute is not None
    constant = edit.constant(f"{value.name}{_GLOBAL_SCALE_SUFFIX}", _input_scale(largest), _SINGLE)
    blocks = {"axis": -1, "block_size": _BLOCK}
    nodes = [
        new_node(
            "TRT_FP4DynamicQuantize",
            [value, constant],
            {f"{value.name}.narrow": _E2M1.onnx_type, f"{value.name}.scales": E4M3.onnx_type},
            f"{value.name}/TRT_FP4DynamicQuantize",
            blocks | {"scale_type": E4M3.onnx_type.value},
            _TENSORRT,
        )
    ]

    def then(
        op_type: str, inputs: list[ir.Value], kind: ir.DataType, attributes: dict[str, int]
    ) -> ir.Value:
        name = f"{value.name}.{len(nodes)}"
        nodes.append(new_node(op_type, inputs, {name: kind}, name, attributes))
        return nodes[-1].outputs[0]

    numbers, scales = nodes[0].outputs
    steps = then("DequantizeLinear", [scales, constant], _SINGLE, {})
    if compute != _SINGLE:
        steps = then("Cast", [steps], compute, {"to": compute.value})
    wide = then("DequantizeLinear", [numbers, steps], compute, blocks)
    edit.after(value, *nodes)
    return wide


def _scales(file: GraphFile, wide: onnx.NodeProto) -> onnx.NodeProto:
    """The DequantizeLinear that makes the scales of one in blocks."""
    node: onnx.NodeProto = file.producers[wide.input[1]]
    return file.producers[node.input[0]] if node.op_type == "Cast" else node


def _emulate(x: Tensor, scale: float) -> Tensor:
    """float32 values as blocks of E2M1 along the last axis have them, over a scale for all."""
    blocks = x.reshape(*x.shape[:-1], -1, _BLOCK)
    peaks = blocks.abs().amax(-1, keepdim=True) / _LARGEST / scale
    steps = peaks.clamp(_LEAST_SCALE, E4M3.largest).to(E4M3.torch_type).float() * scale
    quotients = (blocks / steps).clamp(-_LARGEST, _LARGEST)
    narrow = quotients.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (torch.from_numpy(narrow) * steps).reshape(x.shape)


NVFP4 = _Nvfp4(
    "nvfp4",
    _E2M1,
    activations=("static",),
    attention=E4M3,
    # The first ONNX with E2M1. Of opset 22's operators it only widens the types.
    opsets={"": 23, _TENSORRT: 1},
    ir_version=11,
)
