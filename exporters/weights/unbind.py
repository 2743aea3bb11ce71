"""Unbinding: an exported graph as it was before its weights were bound, so that others can be.

All that tracing and rewriting made of the graph stays. What binding added goes again: external data
and the casts that widen a stored type.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from exporters.formats import Packed
from exporters.formats.number_types import SCALE_SUFFIX, SMOOTHING_SUFFIX
from exporters.quality.layers import Layers
from exporters.weights.decide import Placement, Storing
from fluxdeploy.errors import ExportError

__all__ = ["unbind"]


def unbind(
    path: Path, boundary: int, placements: Sequence[Placement], layers: Layers | None
) -> tuple[ir.Model, dict[str, Packed]]:
    """An exported graph with its weights as inputs again, and the weights that are quantized.

    `placements` are the weights that are to be bound, `layers` of a quantized component, as those
    were that the graph was made with. The result is for `bind`.

    Raises `ExportError` for a file that is no graph with `boundary` inputs and these weights, and
    for quantized weights that share scales.
    """
    try:
        model = ir.from_proto(onnx.load(path, load_external_data=False))
    except Exception as error:  # protobuf's own classes, which differ between its versions
        raise ExportError(f"{path} cannot be read as an ONNX file: {error}.") from error
    graph = model.graph
    bound = {
        name: value
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    missing = [p.name for p in placements if p.name not in bound]
    if missing or len(graph.inputs) != boundary:
        lacks = f" It lacks {missing[0]}." if missing else ""
        raise ExportError(f"{path} is not the graph of this component.{lacks} Build it again.")
    placed = [placement.name for placement in placements]
    others = sorted(bound.keys() - set(placed))
    for name in (*placed, *others):
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    for placement in placements:
        if placement.how is not Storing.QUANTIZED:
            _narrow(graph, bound[placement.name])
    if layers is None:
        return model, {}
    quantized = [p.name for p in placements if p.how is Storing.QUANTIZED]
    return model, {name: _packed(path, bound, name, layers) for name in quantized}


def _narrow(graph: ir.Graph, value: ir.Value) -> None:
    """Undo a cast of a whole weight. One after a Gather stays: no embedding is bound otherwise."""
    users = list(value.uses())
    if len(users) != 1:
        return
    node, _ = users[0]
    if node.op_type != "Cast" or node.name != f"{value.name}/Cast":
        return
    wide = node.outputs[0]
    value.type = ir.TensorType(ir.DataType(node.attributes["to"].as_int()))
    for user, index in list(wide.uses()):
        user.replace_input_with(index, value)
    graph.remove(node, safe=True)


def _packed(path: Path, bound: dict[str, ir.Value], name: str, layers: Layers) -> Packed:
    if layers.format.shares_scales:  # which of them do is not told by the graph
        raise ExportError(
            f"{path} has {layers.format.name} weights that share scales: it takes no others. "
            "Build it again."
        )
    scales = bound.get(f"{name}{SCALE_SUFFIX}")
    if scales is None or scales.dtype is None:
        raise ExportError(f"{path} has no scales of {name}. Build it again.")
    smoothing = bound.get(f"{name}{SMOOTHING_SUFFIX}")
    vector = None
    if smoothing is not None and smoothing.dtype is not None:
        vector = (str(smoothing.name), smoothing.dtype)
    linear = name.removesuffix(".weight")
    factors, mean = layers.smooths(linear), layers.mean(linear)
    return Packed(layers.format, scales.dtype, factors=factors, vector=vector, mean=mean)
