"""Group norms as what ONNX Runtime has a kernel for.

It has none for `GroupNormalization`: it writes each as some 25 nodes when it opens a graph, which
takes more than half of the time that opening the VAE takes, and a variance that is the mean of the
squares less the square of the mean, which loses digits where the mean is large. A group is an
instance whose channels lie one after the other, and `InstanceNormalization` has a kernel, whose
variance is that of the differences from the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["split_group_norms"]


def split_group_norms(model: ir.Model) -> None:
    """Rewrite every group norm, all of which are in float32: the norm alone, scale, bias."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "GroupNormalization":
            continue
        made = _split(graph, node)
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], made, node.outputs, made[-1].outputs
        )


def _split(graph: ir.Graph, norm: ir.Node) -> list[ir.Node]:
    """The nodes in the place of one, in their order."""
    x, scale, bias = norm.inputs
    groups = norm.attributes["num_groups"].as_int()
    epsilon = norm.attributes["epsilon"].as_float()
    # A channel is one number of a scale, and a plane of what is scaled.
    planes = _constant(graph, "group_norm.planes", np.array([1, 2]))
    grouped = _constant(graph, f"group_norm.{groups}.shape", np.array([0, groups, -1]))
    ones = _constant(graph, f"group_norm.{groups}.ones", np.ones(groups, np.float32))
    zeros = _constant(graph, f"group_norm.{groups}.zeros", np.zeros(groups, np.float32))
    nodes: list[ir.Node] = []

    def add(
        name: str, op_type: str, inputs: Sequence[ir.Value | None], **attributes: float
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"{norm.name}.{name}/{op_type}")
        node.outputs[0].name = node.name
        node.outputs[0].type = ir.TensorType(
            ir.DataType.INT64 if op_type == "Shape" else ir.DataType.FLOAT
        )
        nodes.append(node)
        return node.outputs[0]

    normal = add("groups", "Reshape", [x, grouped])
    normal = add("normal", "InstanceNormalization", [normal, ones, zeros], epsilon=epsilon)
    normal = add("channels", "Reshape", [normal, add("size", "Shape", [x])])
    scaled = add("scaled", "Mul", [normal, add("scale", "Unsqueeze", [scale, planes])])
    add("shifted", "Add", [scaled, add("bias", "Unsqueeze", [bias, planes])])
    return nodes


def _constant(graph: ir.Graph, name: str, numbers: NDArray[np.generic]) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(numbers, name=name)))
    return graph.initializers[name]
