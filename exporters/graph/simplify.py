"""Graph clean-up that torch's exporter and the optimizer leave to do."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["drop_round_trips", "simplify_shapes"]


def simplify_shapes(model: ir.Model) -> None:
    """Give every Reshape a constant shape where 0 (keep) and one -1 (infer) can express it.

    torch writes the target of a reshape as a chain of Shape, Gather and Concat over the sizes it
    knows. Most are the input's own sizes in the same place; constants say the same with a tenth of
    the nodes, and runtimes then see a reshape instead of shape arithmetic.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Reshape":
            continue
        data, shape = node.inputs
        assert data is not None
        assert shape is not None
        if shape.const_value is not None:
            continue
        target = _constant_target(data.shape, node.outputs[0].shape)
        if target is None:
            continue
        name = f"{node.outputs[0].name}.shape"
        value = ir.Value(
            name=name,
            shape=ir.Shape((len(target),)),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor(np.array(target, np.int64), name=name),
        )
        graph.register_initializer(value)
        node.replace_input_with(1, value)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def drop_round_trips(model: ir.Model) -> None:
    """Let a value that goes to float32 and straight back be used as it is.

    Such casts come where one stage ends in float32 and the next begins in 16 bits. The way from
    float32 to 16 bits and back rounds, and stays.
    """
    for node in list(model.graph):
        if node.op_type != "Cast" or node.inputs[0] is None:
            continue
        widened = node.inputs[0].producer()
        if widened is None or widened.op_type != "Cast" or widened.inputs[0] is None:
            continue
        original = widened.inputs[0]
        if node.inputs[0].dtype == ir.DataType.FLOAT and original.dtype == node.outputs[0].dtype:
            for user, index in list(node.outputs[0].uses()):
                user.replace_input_with(index, original)


def _constant_target(before: ir.Shape | None, after: ir.Shape | None) -> list[int] | None:
    if before is None or after is None:
        return None
    target: list[int] = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif axis < len(before) and before[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None
