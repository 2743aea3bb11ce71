"""Graph clean-up that needs the symbolic shapes of a trace."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["simplify_shapes"]


def simplify_shapes(model: ir.Model) -> None:
    """Give every Reshape a constant shape where 0 (keep) and one -1 (infer) can express it.

    torch writes the target of a reshape as a chain of Shape, Gather and Concat over the sizes it
    knows. Most are the input's own sizes in the same place; constants say the same with a tenth of
    the nodes, and runtimes then see a reshape instead of shape arithmetic.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[1].const_value is not None:
            continue
        target = _constant_target(node.inputs[0].shape, node.outputs[0].shape)
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
