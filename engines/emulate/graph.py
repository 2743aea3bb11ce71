"""Rewriting a graph in 16, 8 and 4 bits to one in float32 with the same numbers.

A value in 16 bits becomes a float32 that is rounded to those 16 bits by whatever computes it, as
the accumulators of GPUs and AMX are float32. Weights stay where and as they are stored, and are
widened just before they are used.

Scales of quantized values keep the numbers that their 16 bits have. What a product takes
dequantized on both sides is not rounded in between: kernels multiply the narrow numbers, and scale
what comes out. A weight that is dequantized alone is rounded, as there it is widened first.

E2M1, for which there are no kernels, is held in float32 too. TensorRT's operator that makes blocks
of it becomes plain ones: x = q · s · g with s = E4M3(max|block| / 6 / g) and q = E2M1(x / (s · g)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

__all__ = ["emulate"]

_SIXTEEN = (TensorProto.BFLOAT16, TensorProto.FLOAT16)
_E4M3, _E2M1 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1

_MOVES = (
    *("Concat", "Expand", "Gather", "Identity", "Neg", "Pad", "Reshape"),
    *("Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
)
"""Operators that make no number that their inputs have not, but for its sign, and for 0."""

_QUANTIZE_BLOCKS = ("trt", "TRT_FP4DynamicQuantize")
_DOMAINS = ("", "ai.onnx", "com.microsoft")

_LARGEST, _LARGEST_SCALE, _LEAST_SCALE = 6.0, 448.0, 2.0**-9


def emulate(data: bytes) -> bytes:
    """The serialized model with kernels for a CPU, of one as `exporters` writes them.

    External data is not read, and stays external. Raises `ValueError`, saying what is wrong, for a
    graph that cannot be emulated, and what `onnx` raises for bytes that are none.
    """
    model = onnx.load_model_from_string(data)
    if model.functions or any(
        entry.HasField("g") or entry.graphs for node in model.graph.node for entry in node.attribute
    ):
        raise ValueError("it has functions or control flow, which are not emulated")
    _Rewrite(model.graph).apply()
    for domain in [entry for entry in model.opset_import if entry.domain not in _DOMAINS]:
        model.opset_import.remove(domain)
    return bytes(model.SerializeToString())


class _Rewrite:
    """One graph. A value keeps its name where it becomes float32."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._types = {
            value.name: value.type.tensor_type.elem_type
            for value in (*graph.input, *graph.value_info, *graph.output)
        }
        self._types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._users: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._exact = self._find_exact()
        self._tables = {
            tensor.name
            for tensor in graph.initializer
            if all(
                user.op_type == "Gather" and tensor.name not in user.input[1:]
                for user in self._users.get(tensor.name, ())
            )
        }

    def apply(self) -> None:
        waiting = {}
        for tensor in list(self._graph.initializer):
            name = tensor.name
            if (made := list(self._widen(tensor))) != []:
                waiting[name] = made
        nodes: list[NodeProto] = []
        for node in self._graph.node:
            # The runtime keeps this order: of the widened weights it then has one at a time.
            for name in node.input:
                nodes += waiting.pop(name, [])
            nodes += self._replace(node)
        del self._graph.node[:], self._graph.value_info[:]
        self._graph.node.extend(nodes)

    def _find_exact(self) -> set[str]:
        """The dequantized values in 16 bits that are not rounded, and their scales."""
        makers = {name: node for node in self._graph.node for name in node.output}

        def is_narrow(name: str) -> bool:
            return name in makers and makers[name].op_type == "DequantizeLinear"

        def is_product(node: NodeProto) -> bool:
            return node.op_type == "MatMul" and all(map(is_narrow, node.input))

        exact = {
            name
            for name in filter(is_narrow, self._users)
            if all(is_product(user) for user in self._users[name])
        }
        scales = {makers[name].input[1] for name in exact}
        return exact | {
            name
            for name in scales & makers.keys()
            if makers[name].op_type == "Cast"
            and all(user.output[0] in exact for user in self._users[name])
        }

    def _widen(self, tensor: TensorProto) -> Iterator[NodeProto]:
        """Give a weight another name, and its own to what is made of it.

        Of a table, such as an embedding's, only the rows that are picked are widened.
        """
        name, stored = tensor.name, _new(tensor.name, "stored")
        if tensor.data_type in _SIXTEEN and name not in self._tables:
            tensor.name = stored
            yield _cast(stored, name, TensorProto.FLOAT)
        elif tensor.data_type == _E2M1:
            tensor.name, tensor.data_type = stored, TensorProto.UINT4
            yield from self._decode(stored, name)

    def _replace(self, node: NodeProto) -> Iterator[NodeProto]:
        """The nodes that take a node's place."""
        if (node.domain, node.op_type) == _QUANTIZE_BLOCKS:
            yield from self._quantize_blocks(node)
            return
        if node.domain not in _DOMAINS:
            raise ValueError(f"the operator {node.domain}.{node.op_type} is not emulated")
        narrow = [name for name in node.output if self._type(name) in _SIXTEEN]
        # Every other operator makes the type that it takes, which is float32 now.
        converts = node.op_type == "Cast" or not any(
            self._type(name) in _SIXTEEN and name not in self._tables for name in node.input
        )
        if node.op_type == "Cast" and node.output[0] in self._exact:
            yield _cast(node.input[0], node.output[0], TensorProto.FLOAT)
            return
        after = []
        for index, name in enumerate(node.output):
            rounds = converts or node.op_type not in _MOVES
            if name not in narrow or name in self._exact or not rounds:
                continue
            rounded = _new(name, "narrow")
            node.output[index] = rounded if converts else _new(name, "wide")
            if not converts:
                after.append(_cast(node.output[index], rounded, self._type(name)))
            after.append(_cast(rounded, name, TensorProto.FLOAT))
        if node.op_type == "DequantizeLinear" and self._type(node.input[0]) == _E2M1:
            yield from self._scale_blocks(node)
        else:
            yield node
        yield from after

    def _type(self, name: str) -> int:
        if name and name not in self._types:
            raise ValueError(f"it does not say of which type {name} is")
        return int(self._types.get(name, TensorProto.UNDEFINED))

    def _decode(self, stored: str, name: str) -> Iterator[NodeProto]:
        """E2M1 numbers of their codes, which go from 0 to 7, and on to 15 for the negative ones."""
        edit = _Steps(self._constant, name)
        codes = edit.add("Cast", [stored], to=TensorProto.FLOAT)
        negative = edit.add("Less", [edit.number(7), codes])
        above = edit.add("Sub", [codes, edit.number(8)])
        size = edit.add("Where", [negative, above, codes])
        # Codes 0 to 4 are 0.5 apart, 4 to 6 are 1, 6 and 7 are 2: the highest of three lines.
        half = edit.add("Mul", [size, edit.number(0.5)])
        same = edit.add("Sub", [size, edit.number(2)])
        double = edit.add("Sub", [edit.add("Add", [size, size]), edit.number(8)])
        numbers = edit.add("Max", [half, same, double])
        edit.add_last("Where", [negative, edit.add("Neg", [numbers]), numbers])
        yield from edit.nodes

    def _quantize_blocks(self, node: NodeProto) -> Iterator[NodeProto]:
        """TensorRT's operator: x and the scale for all of it, to E2M1 numbers and block scales."""
        settings = _settings(node)
        if settings.get("axis") != -1 or settings.get("scale_type") != TensorProto.FLOAT8E4M3FN:
            raise ValueError(f"the blocks of {node.name} are not of the exporter's kind")
        (x, whole), (numbers, scales) = node.input, node.output
        edit = _Steps(self._constant, numbers)
        blocks = edit.split(x, -1, settings.get("block_size", 0))
        peaks = edit.add("ReduceMax", [edit.add("Abs", [blocks]), edit.whole(-1)], keepdims=0)
        exact = edit.add("Div", [edit.add("Div", [peaks, edit.number(_LARGEST)]), whole])
        bounds = [edit.number(_LEAST_SCALE), edit.number(_LARGEST_SCALE)]
        edit.nodes.append(_cast(edit.add("Clip", [exact, *bounds]), scales, _E4M3))
        step = edit.add("Mul", [edit.add("Cast", [scales], to=TensorProto.FLOAT), whole])
        quotients = edit.add("Div", [blocks, edit.add("Unsqueeze", [step, edit.whole(-1)])])
        bounds = [edit.number(-_LARGEST), edit.number(_LARGEST)]
        quotients = edit.add("Clip", [quotients, *bounds])
        # Numbers up to 2 are 0.5 apart, up to 4 they are 1, up to 6 they are 2.
        fine, middle, coarse = (edit.round(quotients, apart) for apart in (0.5, 1, 2))
        size = edit.add("Abs", [quotients])
        above = edit.add("Where", [edit.add("Less", [size, edit.number(4)]), middle, coarse])
        chosen = edit.add("Where", [edit.add("Less", [size, edit.number(2)]), fine, above])
        edit.add_last("Reshape", [chosen, edit.add("Shape", [x])])
        yield from edit.nodes

    def _scale_blocks(self, node: NodeProto) -> Iterator[NodeProto]:
        """DequantizeLinear of E2M1 numbers in blocks."""
        settings = _settings(node)
        axis, size = settings.get("axis", 1), settings.get("block_size", 0)
        if not size:
            raise ValueError(f"the numbers of {node.name} in 4 bits are not in blocks")
        numbers, scales = node.input
        edit = _Steps(self._constant, node.output[0])
        blocks = edit.split(numbers, axis, size)
        steps = edit.add("Unsqueeze", [scales, edit.whole(axis if axis < 0 else axis + 1)])
        edit.add_last("Reshape", [edit.add("Mul", [blocks, steps]), edit.add("Shape", [numbers])])
        yield from edit.nodes

    def _constant(self, name: str, values: Any) -> str:
        name = _new("constant", name)
        if name not in self._types:
            tensor = numpy_helper.from_array(np.asarray(values), name)
            self._graph.initializer.append(tensor)
            self._types[name] = tensor.data_type
        return name


class _Steps:
    """Plain operators that make the value `name`; `constant` gives one of the graph's."""

    def __init__(self, constant: Callable[[str, Any], str], name: str) -> None:
        self.nodes: list[NodeProto] = []
        self._constant, self._name = constant, name

    def add(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = _new(self._name, len(self.nodes))
        self.nodes.append(_node(op_type, inputs, name, **attributes))
        return name

    def add_last(self, op_type: str, inputs: Sequence[str]) -> None:
        self.nodes.append(_node(op_type, inputs, self._name))

    def number(self, value: float) -> str:
        return self._constant(f"{value:g}", np.float32(value))

    def whole(self, *values: int) -> str:
        return self._constant(str(values), np.array(values, np.int64))

    def round(self, value: str, apart: float) -> str:
        """To multiples of a power of two, of two to the even one."""
        step = self.number(apart)
        return self.add("Mul", [self.add("Round", [self.add("Div", [value, step])]), step])

    def split(self, value: str, axis: int, size: int) -> str:
        """An axis as two: the blocks, and what is in them."""
        shape = [self.add("Shape", [value], end=axis), self.whole(-1, size)]
        if axis != -1:
            shape.append(self.add("Shape", [value], start=axis + 1))
        return self.add("Reshape", [value, self.add("Concat", shape, axis=0)])


def _settings(node: NodeProto) -> dict[str, int]:
    return {entry.name: entry.i for entry in node.attribute}


def _new(name: str, part: str | int) -> str:
    """A name that no exported graph has."""
    return f"emulated/{name}/{part}"


def _node(op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op_type, inputs, [output], _new(output, op_type), **attributes)


def _cast(value: str, output: str, to: int) -> NodeProto:
    return _node("Cast", [value], output, to=to)
