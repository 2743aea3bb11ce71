"""The graph pass that puts a low-rank side path beside linears: y + B (A x), of inputs A and B.

`fluxdeploy.bundle.side_paths` has the inputs. The products are in the type that the linear computes
in, and the sum comes after the bias: what is quantized or fused of a linear stays as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.components.chain import Chain
from exporters.components.side_paths import linear_names
from exporters.formats.graph_edit import new_node
from fluxdeploy.bundle.side_paths import DOWN, UP, is_side_input, kind_of
from fluxdeploy.errors import ExportError

__all__ = ["add_side_paths"]

_FLOAT = ir.DataType.FLOAT


def add_side_paths(model: ir.Model, chain: Chain) -> None:
    """Read what of the chain's inputs belongs to side paths, in a graph that was traced of it.

    Raises `ExportError` where a linear is not in the expected form.
    """
    graph = model.graph
    values = {str(value.name): value for value in graph.inputs}
    if not any(map(is_side_input, values)):
        return
    rows: dict[int, ir.Value] = {}
    for linear in linear_names(chain):
        kind, row = kind_of(linear)
        if DOWN + kind not in values:
            continue
        if row not in rows:
            rows[row] = _row(graph, row)
        down, up = (values[side + kind] for side in (DOWN, UP))
        _add(graph, values[f"{linear}.weight"], linear, (down, up), rows[row])


def _row(graph: ir.Graph, row: int) -> ir.Value:
    name = f"side_path.row.{row}"
    value = ir.val(name, const_value=ir.tensor(np.array(row, np.int64), name=name))
    graph.register_initializer(value)
    return value


def _add(
    graph: ir.Graph, weight: ir.Value, linear: str, sides: tuple[ir.Value, ir.Value], row: ir.Value
) -> None:
    product, output = _linear(weight, linear)
    x = product.inputs[0]
    assert x is not None
    compute, last = x.dtype, output.producer()
    assert compute is not None
    assert last is not None
    prefix, nodes, value = f"{linear}/SidePath", [], x
    for side, name in zip(sides, ("down", "up"), strict=True):
        factor = f"{prefix}/{name}"
        nodes.append(new_node("Gather", [side, row], {factor: _FLOAT}, factor))
        if compute != _FLOAT:
            outputs = {f"{factor}.{compute.name.lower()}": compute}
            to = {"to": compute.value}
            nodes.append(new_node("Cast", [nodes[-1].outputs[0]], outputs, f"{factor}/Cast", to))
        result = f"{factor}/MatMul"
        nodes.append(new_node("MatMul", [value, nodes[-1].outputs[0]], {result: compute}, result))
        value = nodes[-1].outputs[0]
    users = list(output.uses())
    total = new_node("Add", [output, value], {f"{prefix}/Add": compute}, f"{prefix}/Add")
    nodes.append(total)
    graph.insert_after(last, nodes)
    (result_value,) = total.outputs
    result_value.shape = output.shape
    for user, index in users:
        user.replace_input_with(index, result_value)
    for index, end in enumerate(graph.outputs):
        if end is output:
            result_value.name, output.name = output.name, f"{output.name}/before"
            graph.outputs[index] = result_value


def _linear(weight: ir.Value, linear: str) -> tuple[ir.Node, ir.Value]:
    """The product of a linear, and its output with the bias."""
    users = [node for node, _ in weight.uses()]
    node = users[0] if len(users) == 1 else None
    if node is not None and node.op_type == "Gemm":
        return node, node.outputs[0]
    products = [] if node is None else [user for user, _ in node.outputs[0].uses()]
    if (
        node is None
        or node.op_type != "Transpose"
        or len(products) != 1
        or products[0].op_type != "MatMul"
    ):
        raise ExportError(f"{linear} is not one product in the graph, and cannot have a side path.")
    product = products[0]
    output = product.outputs[0]
    after = [user for user, _ in output.uses()]
    if len(after) == 1 and after[0].op_type == "Add":
        others = [str(value.name) for value in after[0].inputs if value not in (None, output)]
        if others == [f"{linear}.bias"]:
            output = after[0].outputs[0]
    return product, output
