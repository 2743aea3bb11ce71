"""INT8, over its symmetric range, whose steps are as wide as the largest value demands.

Beside the graphs of every format of 8 bits there are products of integers, for which the input's
scale is computed every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx import TensorProto
from torch import Tensor

from exporters.formats.base import Activations, Packed, QuantizedLinear
from exporters.formats.graph_edit import GraphEdit, new_node
from exporters.formats.graph_file import GraphFile
from exporters.formats.number_types import SCALE_SUFFIX, EightBits
from exporters.formats.row_scales import RowScaled

__all__ = ["INT8"]

_SINGLE = ir.DataType.FLOAT


def _rounded(quotients: Tensor) -> Tensor:
    return quotients.round().clamp(-128, 127)


_NUMBERS = EightBits(
    stored="I8",
    onnx_type=ir.DataType.INT8,
    torch_type=torch.int8,
    largest=127.0,
    # Headroom costs accuracy everywhere, more than it gains by sparing the few largest values of
    # the layers that go further.
    headroom=1.2,
    rounded=_rounded,
)


@dataclass(frozen=True)
class _Int8(RowScaled):
    """MatMulInteger where activations are dynamic. Its products have to be scaled in float32."""

    def multiply(
        self,
        edit: GraphEdit,
        product: ir.Node,
        weight: ir.Value,
        activations: Activations,
        largest: Callable[[], float],
    ) -> Packed:
        if activations != "dynamic":
            return super().multiply(edit, product, weight, activations, largest)
        x, name = product.inputs[0], product.name
        assert x is not None
        compute = x.dtype
        assert compute is not None
        (scales,) = self.declare(edit, weight, _SINGLE)
        narrow, scale, zero = edit.once(x, lambda: _dynamic(edit, x))
        whole = edit.before(
            product, "MatMulInteger", [narrow, weight, zero], ir.DataType.INT32, name
        )
        wide = edit.before(product, "Cast", [whole], _SINGLE, name, {"to": _SINGLE.value})
        both = edit.before(product, "Mul", [scale, scales], _SINGLE, weight.name)
        result = edit.before(product, "Mul", [wide, both], _SINGLE, name)
        if compute != _SINGLE:
            to = {"to": compute.value}
            result = edit.before(product, "Cast", [result], compute, "out", to)
        edit.replace(product, result)
        return Packed(self, _SINGLE)

    def read(self, file: GraphFile, weight: TensorProto) -> QuantizedLinear:
        (reader,) = file.users[weight.name]
        if reader.op_type != "MatMulInteger":
            return super().read(file, weight)
        scales = file.initializers[weight.name + SCALE_SUFFIX]
        return QuantizedLinear(self, (weight, scales), _emulate_dynamic, file.folder)

    def emulate_input(self, x: Tensor, activations: Activations, largest: float) -> Tensor:
        if activations == "dynamic":
            return _emulate_dynamic(x)
        return super().emulate_input(x, activations, largest)


def _dynamic(edit: GraphEdit, x: ir.Value) -> tuple[ir.Value, ...]:
    """x in 8 bits, its scale and its zero point, computed every time."""
    nodes, source = [], x
    if x.dtype != _SINGLE:
        name = f"{x.name}.float"
        nodes.append(new_node("Cast", [x], {name: _SINGLE}, name, {"to": _SINGLE.value}))
        source = nodes[0].outputs[0]
    outputs = {
        f"{x.name}.u8": ir.DataType.UINT8,
        f"{x.name}.scale": _SINGLE,
        f"{x.name}.zero": ir.DataType.UINT8,
    }
    name = f"{x.name}/DynamicQuantizeLinear"
    nodes.append(new_node("DynamicQuantizeLinear", [source], outputs, name))
    edit.after(x, *nodes)
    return tuple(nodes[-1].outputs)


def _emulate_dynamic(x: Tensor) -> Tensor:
    """DynamicQuantizeLinear and back."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    step = (high - low) / 255 or 1.0
    zero = round(-low / step)
    return (((x / step).round() + zero).clamp(0, 255) - zero) * step


INT8 = _Int8("int8", _NUMBERS, activations=(None, "static", "dynamic"), attention=_NUMBERS)
