"""Reading a graph backwards, node by node: what a node is, and a refusal where it is another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import onnx_ir as ir

from fluxdeploy.errors import EngineError

__all__ = [
    "INSTEAD",
    "NodeReader",
    "given",
    "is_parameter",
    "numbers",
    "perm_of",
    "refuse",
    "sizes_of",
]

INSTEAD = "use --runtime onnxruntime"
"""What to do with a graph that is of another form."""


def refuse(node: ir.Node) -> NoReturn:
    """Raise the `EngineError` that names a node."""
    raise EngineError(
        f"The transformer's graph has {node.name or node.outputs[0].name} ({node.op_type}), which "
        f"the native runtime does not know: {INSTEAD}."
    )


class NodeReader:
    """A graph that is being read; `known` are the nodes that have a meaning so far.

    Every method raises `EngineError` for a node of another form than the one it reads.
    """

    def __init__(self) -> None:
        self.known: set[ir.Node] = set()

    def made(self, value: ir.Value | None, *op_types: str, **attributes: int) -> ir.Node:
        """The node that makes a value: one of these operators, with these attributes."""
        node = None if value is None else value.producer()
        if node is None:
            self.miss(value, op_types[0])
        if node.op_type not in op_types or node.domain not in ("", "ai.onnx"):
            refuse(node)
        for name, number in attributes.items():
            if node.attributes.get_int(name, _DEFAULTS.get((node.op_type, name))) != number:
                refuse(node)
        self.known.add(node)
        return node

    def miss(self, value: ir.Value | None, op_type: str) -> NoReturn:
        """Refuse a value that no node makes."""
        raise EngineError(
            f"The transformer's graph reads {'nothing' if value is None else value.name} where the "
            f"native runtime expects what a {op_type} makes: {INSTEAD}."
        )

    def hold(self, fits: bool, value: ir.Value) -> None:
        """Refuse the node that makes a value where what it is made of does not fit together."""
        if not fits:
            node = value.producer()
            if node is None:
                self.miss(value, "Cast")
            refuse(node)

    def cast(self, value: ir.Value | None, kind: ir.DataType) -> ir.Value:
        """What a value is a cast of, to this type."""
        return given(self.made(value, "Cast", to=kind.value), 0)

    def transposed(self, value: ir.Value | None, perm: Sequence[int]) -> ir.Value:
        """What a value is, with its axes in another order."""
        node = self.made(value, "Transpose")
        if perm_of(node) != tuple(perm):
            refuse(node)
        return given(node, 0)

    def concatenated(self, value: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
        """The two values that one is made of."""
        node = self.made(value, "Concat", axis=axis)
        if len(node.inputs) != 2:
            refuse(node)
        return given(node, 0), given(node, 1)

    def dequantized(self, value: ir.Value) -> tuple[ir.Value, float | None]:
        """What a value is a copy of in E4M3, and its scale; the value itself where it is none."""
        node = value.producer()
        if node is None or node.op_type != "DequantizeLinear":
            return value, None
        wide = self.made(value, "DequantizeLinear")
        narrow = self.made(wide.inputs[0], "QuantizeLinear")
        if narrow.outputs[0].dtype != ir.DataType.FLOAT8E4M3FN or not _same_scale(wide, narrow):
            refuse(narrow)
        (step,) = numbers(narrow.inputs[1])
        return given(narrow, 0), step

    def parameter(self, node: ir.Node, index: int, shape: tuple[int, ...]) -> str:
        """The name of an initializer that a node reads."""
        value = given(node, index)
        if not is_parameter(value) or sizes_of(value) != list(shape):
            refuse(node)
        return str(value.name)


_DEFAULTS: dict[tuple[str, str], int] = {
    ("Softmax", "axis"): -1,
    ("Reshape", "allowzero"): 0,
    ("LayerNormalization", "axis"): -1,
    ("LayerNormalization", "stash_type"): 1,
    ("ReduceMean", "keepdims"): 1,
    ("ReduceMean", "noop_with_empty_axes"): 0,
}
"""What ONNX says of attributes that are not there."""


def given(node: ir.Node, index: int) -> ir.Value:
    """An input of a node that it must have."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        refuse(node)
    return value


def perm_of(node: ir.Node) -> tuple[int, ...]:
    """The order of a Transpose's axes."""
    return tuple(node.attributes.get_ints("perm", ()) or ())


def is_parameter(value: ir.Value | None) -> bool:
    """Whether a value is an initializer."""
    return value is not None and value.const_value is not None and value.is_initializer()


def sizes_of(value: ir.Value | None) -> list[int]:
    """A value's shape, with -1 for what is no number; [] where it is not known."""
    shape = None if value is None else value.shape
    return [] if shape is None else [size if isinstance(size, int) else -1 for size in shape]


def numbers(value: ir.Value | None) -> list[Any]:
    """The numbers of a constant in the graph itself; [] of another value."""
    tensor = None if value is None else value.const_value
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return []
    return list(tensor.numpy().ravel().tolist())


def _same_scale(wide: ir.Node, narrow: ir.Node) -> bool:
    """Whether Q and DQ have one number as their scale, and no zero point."""
    scales = [numbers(node.inputs[1]) if len(node.inputs) == 2 else [] for node in (wide, narrow)]
    return scales[0] == scales[1] and len(scales[0]) == 1 and scales[0][0] > 0
