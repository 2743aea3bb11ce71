"""The graph pass: quantized weights, and scales around the products that are to run in few bits.

Standard ONNX operators in the forms that TensorRT fuses and ONNX Runtime reads. An 8-bit scale has
the type that the product computes in: with float32 scales in a 16-bit graph TensorRT keeps the
16-bit kernels.

FP4 takes one operator that is TensorRT's own, since ONNX has none that makes the scales of blocks:
TRT_FP4DynamicQuantize(x, g) gives E2M1 numbers q and E4M3 block scales s with x = q · s · g.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir

from exporters.formats.nvfp4 import BLOCK, LARGEST_PRODUCT
from exporters.weights.storage import GLOBAL_SCALE_SUFFIX, SCALE_SUFFIX, Packed
from fluxdeploy.errors import ExportError
from fluxdeploy.precision import Quantization

if TYPE_CHECKING:
    from exporters.calibrate.ranges import Ranges

__all__ = ["LARGEST", "QUANTIZED_TYPES", "quantize"]

QUANTIZED_TYPES = {
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "I8": ir.DataType.INT8,
    "F4": ir.DataType.FLOAT4E2M1,
}
STORED = {"fp8": "F8_E4M3", "int8": "I8", "nvfp4": "F4"}
LARGEST = {"F8_E4M3": 448.0, "I8": 127.0}
"""The largest value of each 8-bit type. Of INT8 the symmetric range is used."""

_TENSORRT = "trt"
"""The domain of TensorRT's own operators."""

_FP4_OPSET, _FP4_IR = 23, 11
"""The first ONNX with E2M1. Of opset 22's operators it only widens the types."""

# Inputs were measured over a few prompts, and others go further: over other prompts and seeds by up
# to 1.4 times in single layers, mostly by less than 1.2. E4M3 is a floating-point type: a scale
# twice as large costs it nothing but its very smallest values; so for E2M1, whose block scales are
# E4M3. INT8 pays for headroom with accuracy everywhere, more than it gains by sparing the few
# largest values of those layers.
_HEADROOM = {"F8_E4M3": 2.0, "I8": 1.2}

_NUMPY = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


def quantize(
    model: ir.Model,
    boundary: int,
    component: str,
    is_quantized: Callable[[str], bool],
    quantization: Quantization,
    ranges: Ranges | None,
) -> dict[str, Packed]:
    """Rewrite a traced graph, whose inputs after the first `boundary` are its weights.

    `is_quantized` tells the linears to quantize. `ranges` are needed where inputs of linears are
    quantized with static scales. Returns the weights that are quantized. Raises `ExportError` where
    a linear is not in the expected form, or where a range is missing.
    """
    rewrite = _Rewrite(model.graph, component, quantization, ranges)
    for value in list(model.graph.inputs[boundary:]):
        linear = str(value.name).removesuffix(".weight")
        if linear != value.name and is_quantized(linear):
            rewrite.linear(value, linear)
    if quantization.attention:
        for node in [node for node in model.graph if node.op_type == "Softmax"]:
            rewrite.attention(node)
    if quantization.format == "nvfp4":
        model.graph.opset_imports.update({"": _FP4_OPSET, _TENSORRT: 1})
        model.ir_version = _FP4_IR
    return rewrite.packed


class _Rewrite:
    def __init__(
        self,
        graph: ir.Graph,
        component: str,
        quantization: Quantization,
        ranges: Ranges | None,
    ) -> None:
        self.packed: dict[str, Packed] = {}
        self._graph = graph
        self._component = component
        self._how = quantization
        self._ranges = ranges
        self._type = QUANTIZED_TYPES[STORED[quantization.format]]
        self._eight_bits = "I8" if quantization.format == "int8" else "F8_E4M3"
        # Linears that read the same value share its scale, so that an engine can merge them.
        self._inputs: dict[ir.Value, ir.Value] = {}
        self._dynamic: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}

    def linear(self, weight: ir.Value, linear: str) -> None:
        """Quantize x · Wᵀ where W is the parameter of a linear."""
        users = [node for node, _ in weight.uses()]
        transpose = users[0] if len(users) == 1 else None
        products = [] if transpose is None else list(transpose.outputs[0].uses())
        if transpose is None or transpose.op_type != "Transpose" or len(products) != 1:
            raise ExportError(f"{self._component}: {linear} is not one product in the graph.")
        product, place = products[0]
        if product.op_type != "MatMul" or place != 1:
            raise ExportError(f"{self._component}: {linear} is a {product.op_type}, not a MatMul.")
        shape = weight.shape
        # Integer products have to be scaled in float32.
        compute = ir.DataType.FLOAT if self._how.activations == "dynamic" else weight.dtype
        assert compute is not None
        assert shape is not None
        # The stored bytes are those of the transposed matrix: the product takes them as they are.
        weight.type = ir.TensorType(self._type)
        weight.shape = ir.Shape((shape[1], shape[0]))
        if self._how.format == "nvfp4":
            self._fp4_product(product, weight, linear)
            self._graph.remove(transpose, safe=True)
            return
        scales = self._parameter(f"{weight.name}{SCALE_SUFFIX}", (shape[0],), compute)
        self.packed[str(weight.name)] = Packed(STORED[self._how.format], compute)
        if self._how.activations == "dynamic":
            self._integer_product(product, weight, scales)
        else:
            wide = self._node(
                product, "DequantizeLinear", [weight, scales], compute, "weight", {"axis": 1}
            )
            product.replace_input_with(1, wide)
            if self._how.activations == "static":
                product.replace_input_with(0, self._scaled_input(product, linear))
        self._graph.remove(transpose, safe=True)

    def attention(self, softmax: ir.Node) -> None:
        """Quantize Q, K, softmax output and V of softmax(Q Kᵀ) V.

        All four, since one of them left in 16 bits leaves the whole attention unfused.
        """
        scope = str(softmax.name).partition("/")[0].rpartition(".")[0] + ".attn"
        scores = _producer_of(softmax.inputs[0])
        mixed, place = _user_of(softmax.outputs[0])
        if scores is None or scores.op_type != "MatMul" or mixed.op_type != "MatMul" or place != 0:
            raise ExportError(f"{self._component}: {scope} is not softmax(Q Kᵀ) V in the graph.")
        ranges = self._required()
        for node, index, largest in (
            (scores, 0, ranges.queries),
            (scores, 1, ranges.keys),
            (mixed, 0, {scope: 1.0}),
            (mixed, 1, {s: _HEADROOM[self._eight_bits] * v for s, v in ranges.values.items()}),
        ):
            if scope not in largest:
                raise ExportError(f"The activation ranges lack {scope}: measure them again.")
            value = node.inputs[index]
            assert value is not None
            node.replace_input_with(index, self._through_8_bits(value, largest[scope]))

    def _required(self) -> Ranges:
        if self._ranges is None:
            raise ExportError(
                f"{self._component}: static quantization needs measured activation ranges."
            )
        return self._ranges

    def _scaled_input(self, product: ir.Node, linear: str) -> ir.Value:
        x = product.inputs[0]
        assert x is not None
        if x not in self._inputs:
            largest = self._required().inputs.get(linear)
            if largest is None:
                raise ExportError(f"The activation ranges lack {linear}: measure them again.")
            narrow = self._through_4_bits if self._how.format == "nvfp4" else self._through_8_bits
            self._inputs[x] = narrow(x, _HEADROOM[self._eight_bits] * largest)
        return self._inputs[x]

    def _through_8_bits(self, value: ir.Value, largest: float) -> ir.Value:
        """`value` rounded to the 8-bit type, with the scale that maps `largest` to its end."""
        compute = value.dtype
        assert compute is not None
        # A scale that FP16 would round to 0 divides by it.
        least = float(ml_dtypes.finfo(_NUMPY[compute]).smallest_normal)  # type: ignore[no-untyped-call]
        step = max((largest or 1.0) / LARGEST[self._eight_bits], least)
        constant = self._constant(f"{value.name}{SCALE_SUFFIX}", step, compute)
        kind = QUANTIZED_TYPES[self._eight_bits]
        narrow = ir.Node(
            "",
            "QuantizeLinear",
            [value, constant],
            attributes=[ir.AttrInt64("output_dtype", kind.value)],
            outputs=[ir.Value(name=f"{value.name}.narrow", type=ir.TensorType(kind))],
            name=f"{value.name}/QuantizeLinear",
        )
        wide = ir.Node(
            "",
            "DequantizeLinear",
            [narrow.outputs[0], constant],
            outputs=[ir.Value(name=f"{value.name}.wide", type=ir.TensorType(compute))],
            name=f"{value.name}/DequantizeLinear",
        )
        self._insert_after(value, narrow, wide)
        return wide.outputs[0]

    def _fp4_product(self, product: ir.Node, weight: ir.Value, linear: str) -> None:
        """x · W with both in blocks of E2M1; `weight` [in, out] has its new type."""
        compute, shape = product.outputs[0].dtype, weight.shape
        assert compute is not None
        assert shape is not None
        columns, rows = shape.numpy()
        if columns % BLOCK or rows % 2:
            raise ExportError(
                f"{self._component}: {linear} takes {columns} numbers and gives {rows}; FP4 needs "
                f"multiples of {BLOCK} and 2. Use fp8."
            )
        eight, single = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT
        scales = self._parameter(f"{weight.name}{SCALE_SUFFIX}", (columns // BLOCK, rows), eight)
        one = self._parameter(f"{weight.name}{GLOBAL_SCALE_SUFFIX}", (), single)
        x = product.inputs[0]
        assert x is not None
        self.packed[str(weight.name)] = Packed("F4", eight, str(x.name))
        steps = self._node(product, "DequantizeLinear", [scales, one], single, "scales")
        if compute != single:
            to = {"to": compute.value}
            steps = self._node(product, "Cast", [steps], compute, "scales", to)
        blocks = {"axis": 0, "block_size": BLOCK}
        wide = self._node(product, "DequantizeLinear", [weight, steps], compute, "weight", blocks)
        product.replace_input_with(1, wide)
        product.replace_input_with(0, self._scaled_input(product, linear))

    def _through_4_bits(self, value: ir.Value, largest: float) -> ir.Value:
        """`value` in blocks of E2M1 and back. `largest` maps to the largest number with a scale.

        What is larger is cut off.
        """
        compute, single = value.dtype, ir.DataType.FLOAT
        assert compute is not None
        least = float(np.finfo(np.float32).smallest_normal)
        step = max((largest or 1.0) / LARGEST_PRODUCT, least)
        constant = self._constant(f"{value.name}{GLOBAL_SCALE_SUFFIX}", step, single)
        outputs = [
            ir.Value(name=f"{value.name}.{part}", type=ir.TensorType(kind))
            for part, kind in (
                ("narrow", ir.DataType.FLOAT4E2M1),
                ("scales", ir.DataType.FLOAT8E4M3FN),
            )
        ]
        blocks = {"axis": -1, "block_size": BLOCK}
        scale_type = {"scale_type": ir.DataType.FLOAT8E4M3FN.value}
        nodes = [
            ir.Node(
                _TENSORRT,
                "TRT_FP4DynamicQuantize",
                [value, constant],
                attributes=_integers(blocks | scale_type),
                outputs=outputs,
                name=f"{value.name}/TRT_FP4DynamicQuantize",
            )
        ]

        def then(
            op_type: str, inputs: list[ir.Value], kind: ir.DataType, attributes: Mapping[str, int]
        ) -> ir.Value:
            name = f"{value.name}.{len(nodes)}"
            made = ir.Value(name=name, type=ir.TensorType(kind))
            nodes.append(
                ir.Node("", op_type, inputs, _integers(attributes), outputs=[made], name=name)
            )
            return made

        steps = then("DequantizeLinear", [outputs[1], constant], single, {})
        if compute != single:
            steps = then("Cast", [steps], compute, {"to": compute.value})
        wide = then("DequantizeLinear", [outputs[0], steps], compute, blocks)
        self._insert_after(value, *nodes)
        return wide

    def _parameter(
        self, name: str, shape: tuple[int | ir.SymbolicDim, ...], dtype: ir.DataType
    ) -> ir.Value:
        """A new parameter of the graph."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._graph.inputs.append(value)
        return value

    def _constant(self, name: str, number: float, dtype: ir.DataType) -> ir.Value:
        """A new scalar in the graph."""
        value = ir.Value(
            name=name,
            shape=ir.Shape(()),
            type=ir.TensorType(dtype),
            const_value=ir.Tensor(np.asarray(number, _NUMPY[dtype]), dtype=dtype, name=name),
        )
        self._graph.register_initializer(value)
        return value

    def _integer_product(self, product: ir.Node, weight: ir.Value, scales: ir.Value) -> None:
        """x · W in INT8 with the scale of x computed every time."""
        x, single, name = product.inputs[0], ir.DataType.FLOAT, product.name
        assert x is not None
        compute = x.dtype
        assert compute is not None
        if x not in self._dynamic:
            self._dynamic[x] = self._dynamic_input(x)
        narrow, scale, zero = self._dynamic[x]
        whole = self._node(
            product, "MatMulInteger", [narrow, weight, zero], ir.DataType.INT32, name
        )
        wide = self._node(product, "Cast", [whole], single, name, {"to": single.value})
        both = self._node(product, "Mul", [scale, scales], single, weight.name)
        result = self._node(product, "Mul", [wide, both], single, name)
        if compute != single:
            result = self._node(product, "Cast", [result], compute, "out", {"to": compute.value})
        for user, index in list(product.outputs[0].uses()):
            user.replace_input_with(index, result)
        self._graph.remove(product, safe=True)

    def _dynamic_input(self, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """x in 8 bits, its scale and its zero point."""
        nodes = []
        source = x
        if x.dtype != ir.DataType.FLOAT:
            source = ir.Value(name=f"{x.name}.float", type=ir.TensorType(ir.DataType.FLOAT))
            to = ir.AttrInt64("to", ir.DataType.FLOAT.value)
            nodes.append(ir.Node("", "Cast", [x], [to], outputs=[source], name=source.name))
        outputs = [
            ir.Value(name=f"{x.name}.{part}", type=ir.TensorType(dtype))
            for part, dtype in (
                ("u8", ir.DataType.UINT8),
                ("scale", ir.DataType.FLOAT),
                ("zero", ir.DataType.UINT8),
            )
        ]
        name = f"{x.name}/DynamicQuantizeLinear"
        nodes.append(ir.Node("", "DynamicQuantizeLinear", [source], outputs=outputs, name=name))
        self._insert_after(x, *nodes)
        return outputs[0], outputs[1], outputs[2]

    def _insert_after(self, value: ir.Value, *nodes: ir.Node) -> None:
        """Nodes as early as can be: the first of several users need not be the first in order."""
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], nodes)
        else:
            self._graph.insert_after(producer, nodes)

    def _node(
        self,
        before: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        dtype: ir.DataType,
        name: str | None,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        """A new node before another; returns its output."""
        full = f"{before.name}/{name}/{op_type}"
        node = ir.Node(
            "",
            op_type,
            inputs,
            attributes=_integers(attributes or {}),
            outputs=[ir.Value(name=full, type=ir.TensorType(dtype))],
            name=full,
        )
        self._graph.insert_before(before, node)
        return node.outputs[0]


def _integers(attributes: Mapping[str, int]) -> list[ir.Attr]:
    return [ir.AttrInt64(key, value) for key, value in attributes.items()]


def _producer_of(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value, looking through casts."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type == "Cast":
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return node


def _user_of(value: ir.Value) -> tuple[ir.Node, int]:
    """The one node that reads a value, looking through casts, and at which input."""
    node, index = next(iter(value.uses()))
    while node.op_type == "Cast":
        node, index = next(iter(node.outputs[0].uses()))
    return node, index
