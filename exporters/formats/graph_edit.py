"""What formats add to a traced graph: parameters, constants and nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

__all__ = ["GraphEdit", "new_node"]


def new_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    outputs: Mapping[str, ir.DataType],
    name: str,
    attributes: Mapping[str, int] | None = None,
    domain: str = "",
) -> ir.Node:
    """A node that is in no graph yet; `outputs` are the names and types of what it writes."""
    return ir.Node(
        domain,
        op_type,
        inputs,
        attributes=[ir.AttrInt64(key, value) for key, value in (attributes or {}).items()],
        outputs=[ir.Value(name=made, type=ir.TensorType(kind)) for made, kind in outputs.items()],
        name=name,
    )


class GraphEdit:
    """A graph in which products are being rewritten."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[ir.Value, tuple[ir.Value, ...]] = {}

    def once(
        self, value: ir.Value, make: Callable[[], tuple[ir.Value, ...]]
    ) -> tuple[ir.Value, ...]:
        """What `make` makes of the input of a product, made for the first product that reads it.

        Linears that read the same value share its scale, so that an engine can merge them.
        """
        if value not in self._made:
            self._made[value] = make()
        return self._made[value]

    def parameter(self, name: str, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
        """A new parameter of the graph."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._graph.inputs.append(value)
        return value

    def constant(self, name: str, numbers: float | Sequence[int], dtype: ir.DataType) -> ir.Value:
        """A new scalar in the graph, or a vector."""
        array = np.asarray(numbers, dtype.numpy())
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(dtype),
            const_value=ir.Tensor(array, dtype=dtype, name=name),
        )
        self._graph.register_initializer(value)
        return value

    def before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
        name: str | None,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        """A new node before another; returns its output."""
        full = f"{node.name}/{name}/{op_type}"
        made = new_node(op_type, inputs, {full: dtype}, full, attributes)
        self._graph.insert_before(node, made)
        return made.outputs[0]

    def after(self, value: ir.Value, *nodes: ir.Node) -> None:
        """Nodes as early as can be: the first of several users need not be the first in order."""
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], nodes)
        else:
            self._graph.insert_after(producer, nodes)

    def replace(self, node: ir.Node, result: ir.Value) -> None:
        """Give `result` to all users of a node's output, and remove the node."""
        for user, index in list(node.outputs[0].uses()):
            user.replace_input_with(index, result)
        self._graph.remove(node, safe=True)
