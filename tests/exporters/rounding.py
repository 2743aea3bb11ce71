"""A graph of 16 bits as a CPU can run it: in float32, with or without the rounding of GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401  NumPy's bfloat16
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["run_rounded", "widened"]

_16_BITS = (TensorProto.BFLOAT16, TensorProto.FLOAT16)


def run_rounded(
    path: Path, inputs: dict[str, NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    """What a graph makes of inputs where operators compute in float32 and round what they give.

    RoPE rounds its products too: its kernel computes in the type of its input. Sums inside
    attention are not rounded, which their kernels do for some.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        _rounded(path).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def widened(path: Path) -> onnx.ModelProto:
    """A graph of 16 bits with its weights, in float32."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type in _16_BITS:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i in _16_BITS:
                attribute.i = TensorProto.FLOAT
    del model.graph.value_info[:]
    return model


def _rounded(path: Path) -> onnx.ModelProto:
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    model = widened(path)
    zero = numpy_helper.from_array(np.zeros((), np.float32), "rounding.zero")
    model.graph.initializer.append(zero)
    nodes = [new for node in model.graph.node for new in _with_rounding(node, kinds)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _with_rounding(node: onnx.NodeProto, kinds: dict[str, int]) -> Iterator[onnx.NodeProto]:
    narrow = {name: kinds[name] for name in node.output if kinds.get(name) in _16_BITS}
    if node.op_type == "RotaryEmbedding" and narrow:
        x, position, cos, sin = node.input
        ((name, kind),) = narrow.items()
        zeros = {table: f"{name}.{table}.zero" for table in (cos, sin)}
        for table, none in zeros.items():
            yield helper.make_node("Mul", [table, "rounding.zero"], [none])
        products = []
        for tables in ((cos, zeros[sin]), (zeros[cos], sin)):
            product = onnx.NodeProto()
            product.CopyFrom(node)
            product.input[:] = [x, position, *tables]
            products.append(f"{name}.product.{len(products)}")
            product.name, product.output[:] = products[-1], [f"{products[-1]}.exact"]
            yield product
            yield from _round(f"{products[-1]}.exact", products[-1], kind)
        yield helper.make_node("Add", products, [f"{name}.exact"])
        yield from _round(f"{name}.exact", name, kind)
        return
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.output[:] = [f"{name}.exact" if name in narrow else name for name in node.output]
    yield copy
    for name, kind in narrow.items():
        yield from _round(f"{name}.exact", name, kind)


def _round(exact: str, name: str, kind: int) -> Iterator[onnx.NodeProto]:
    yield helper.make_node("Cast", [exact], [f"{name}.rounded"], to=kind)
    yield helper.make_node("Cast", [f"{name}.rounded"], [name], to=TensorProto.FLOAT)
