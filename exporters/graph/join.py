"""Linears of one shape that read the same value as one product: q, k and v of each stream."""

from __future__ import annotations

from itertools import groupby

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["join_products"]


def join_products(model: ir.Model) -> None:
    """Rewrite such linears as one over all their rows, whose result is split.

    Their weights and biases stay parameters of their own, which a Concat joins: it is folded when
    a graph is opened.
    """
    products = [node for node in model.graph if node.op_type == "MatMul" and _linear(node)]
    order = {node: place for place, node in enumerate(model.graph)}

    def group(node: ir.Node) -> tuple[int, tuple[int, ...]]:
        x, weight = node.inputs[0], _linear(node)[0]
        assert x is not None
        assert weight.shape is not None
        maker = x.producer()
        return (-1 if maker is None else order[maker], tuple(weight.shape.numpy()))

    for _, found in groupby(sorted(products, key=group), key=group):
        nodes = sorted(found, key=order.__getitem__)
        if len(nodes) > 1:
            _join(model.graph, nodes)
    RemoveUnusedNodesPass()(model)


def _linear(node: ir.Node) -> tuple[ir.Value, ...]:
    """The weight and the bias of a product with both as parameters, else nothing."""
    turned = None if node.inputs[1] is None else node.inputs[1].producer()
    users = list(node.outputs[0].uses())
    if turned is None or turned.op_type != "Transpose" or len(users) != 1:
        return ()
    add, place = users[0]
    values = (turned.inputs[0], add.inputs[1 - place] if add.op_type == "Add" else None)
    if any(value is None or value.producer() is not None for value in values):
        return ()
    return tuple(value for value in values if value is not None)


def _join(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first = nodes[0]
    adds = [next(iter(node.outputs[0].uses()))[0] for node in nodes]
    pairs = [_linear(node) for node in nodes]
    weights, biases = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    x, kind = first.inputs[0], weights[0].dtype
    assert x is not None
    assert kind is not None
    name = f"{first.name}.joined"
    sizes = [int(weight.shape.numpy()[0]) for weight in weights if weight.shape is not None]
    ends = [add.outputs[0] for add in adds]

    def made(op_type: str, inputs: list[ir.Value], **attributes: int | tuple[int, ...]) -> ir.Node:
        node = ir.node(op_type, inputs, attributes, name=f"{name}/{op_type}/{inputs[0].name}")
        node.outputs[0].name = node.name
        node.outputs[0].type = ir.TensorType(kind)
        return node

    rows = made("Concat", weights, axis=0)
    turned = made("Transpose", [rows.outputs[0]], perm=(1, 0))
    product = made("MatMul", [x, turned.outputs[0]])
    bias = made("Concat", biases, axis=0)
    total = made("Add", [product.outputs[0], bias.outputs[0]])
    lengths = ir.val(f"{name}.sizes", const_value=ir.tensor(sizes, ir.DataType.INT64))
    lengths.const_value.name = lengths.name  # type: ignore[union-attr]
    graph.register_initializer(lengths)
    split = ir.Node(
        "",
        "Split",
        [total.outputs[0], lengths],
        attributes=[ir.AttrInt64("axis", -1)],
        outputs=[ir.Value(name=f"{end.name}.part", type=ir.TensorType(kind)) for end in ends],
        name=f"{name}/Split",
    )
    graph.insert_before(first, [rows, turned, product, bias, total, split])
    for end, part in zip(ends, split.outputs, strict=True):
        for user, index in list(end.uses()):
            user.replace_input_with(index, part)
