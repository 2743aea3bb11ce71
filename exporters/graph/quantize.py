"""The graph pass: it finds the products that are to run in few bits; their format rewrites them.

What a quantized product looks like is a module of `exporters.formats`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from exporters.formats import Packed
from exporters.formats.graph_edit import GraphEdit, new_node
from exporters.formats.number_types import SMOOTHING_SUFFIX
from exporters.quality.layers import Layers
from fluxdeploy.errors import ExportError

__all__ = ["quantize"]


def quantize(
    model: ir.Model,
    boundary: int,
    component: str,
    is_quantized: Callable[[str], bool],
    layers: Layers,
) -> dict[str, Packed]:
    """Rewrite a traced graph, whose inputs after the first `boundary` are its weights.

    `component` is its name for messages, `is_quantized` says of a linear's name whether it is one
    of the large ones, of which `layers` says what becomes of them. Returns the weights that are
    quantized. Raises `ExportError` where a linear is not in the expected form, or where a range is
    missing, or for a quantization that its format has not.
    """
    rewrite = _Rewrite(model.graph, component, layers)
    packed = {}
    for value in list(model.graph.inputs[boundary:]):
        linear = str(value.name).removesuffix(".weight")
        if linear != value.name and is_quantized(linear) and layers.has_weight(linear):
            packed[str(value.name)] = rewrite.linear(value, linear)
    if layers.quantization.attention:
        for node in [node for node in model.graph if node.op_type == "Softmax"]:
            rewrite.attention(node)
    model.graph.opset_imports.update(layers.format.opsets)
    model.ir_version = max(model.ir_version, layers.format.ir_version)
    return packed


class _Rewrite:
    def __init__(self, graph: ir.Graph, component: str, layers: Layers) -> None:
        self._graph = graph
        self._component = component
        self._layers = layers
        self._format = layers.format
        self._edit = GraphEdit(graph)
        asked = layers.quantization.activations
        if asked not in self._format.activations:
            known = ", ".join(how or "none" for how in self._format.activations)
            raise ExportError(
                f"{component}: {self._format.name} has no linears whose inputs are quantized as "
                f"{asked or 'none'}; it has {known}."
            )

    def linear(self, weight: ir.Value, linear: str) -> Packed:
        """Quantize x · Wᵀ where W is the parameter of a linear."""
        users = [node for node, _ in weight.uses()]
        transpose = users[0] if len(users) == 1 else None
        products = [] if transpose is None else list(transpose.outputs[0].uses())
        if transpose is None or transpose.op_type != "Transpose" or len(products) != 1:
            raise ExportError(f"{self._component}: {linear} is not one product in the graph.")
        product, place = products[0]
        if product.op_type != "MatMul" or place != 1:
            raise ExportError(f"{self._component}: {linear} is a {product.op_type}, not a MatMul.")
        assert weight.shape is not None
        rows, columns = weight.shape.numpy()
        if problem := self._format.problem(rows, columns):
            raise ExportError(f"{self._component}: {linear} {problem}")

        def largest() -> float:
            return self._layers.largest(linear)

        factors = self._layers.smooths(linear)
        vector = None if factors is None else self._smooth(product, weight, columns)
        packed = self._format.multiply(
            self._edit, product, weight, self._layers.activations(linear), largest
        )
        self._graph.remove(transpose, safe=True)
        mean, informed = self._layers.mean(linear), self._layers.format_of(linear)
        return replace(packed, format=informed, factors=factors, vector=vector, mean=mean)

    def _smooth(
        self, product: ir.Node, weight: ir.Value, columns: int
    ) -> tuple[str, ir.DataType] | None:
        """Multiply a product's input with a vector; what it is where this weight is the first."""
        x = product.inputs[0]
        assert x is not None
        compute = x.dtype
        assert compute is not None
        name, made = f"{weight.name}{SMOOTHING_SUFFIX}", []

        def make() -> tuple[ir.Value, ...]:
            made.append(name)
            vector = self._edit.parameter(name, (columns,), compute)
            outputs = {f"{x.name}.smooth": compute}
            node = new_node("Mul", [x, vector], outputs, f"{x.name}/Smooth")
            self._edit.after(x, node)
            return (node.outputs[0],)

        (smooth,) = self._edit.once(x, make)
        product.replace_input_with(0, smooth)
        return (name, compute) if made else None

    def attention(self, softmax: ir.Node) -> None:
        """Quantize Q, K, softmax output and V of softmax(Q Kᵀ) V.

        All four, since one of them left in 16 bits leaves the whole attention unfused.
        """
        scope = str(softmax.name).partition("/")[0].rpartition(".")[0] + ".attn"
        scores = _producer_of(softmax.inputs[0])
        mixed, place = _user_of(softmax.outputs[0])
        if scores is None or scores.op_type != "MatMul" or mixed.op_type != "MatMul" or place != 0:
            raise ExportError(f"{self._component}: {scope} is not softmax(Q Kᵀ) V in the graph.")
        if not self._layers.has_attention(scope):
            return
        layers, numbers = self._layers, self._format.attention
        # Of Q, K and the softmax the largest are bounds, which need no headroom.
        for node, index, largest in (
            (scores, 0, layers.attention_range("queries", scope)),
            (scores, 1, layers.attention_range("keys", scope)),
            (mixed, 0, 1.0),
            (mixed, 1, numbers.headroom * layers.attention_range("values", scope)),
        ):
            value = node.inputs[index]
            assert value is not None
            node.replace_input_with(index, numbers.narrow(self._edit, value, largest))


def _producer_of(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value, looking through casts."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type == "Cast":
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return node


def _user_of(value: ir.Value) -> tuple[ir.Node, int]:
    """The one node that reads a value, looking through casts, and at which input."""
    node, index = next(iter(value.uses()))
    while node.op_type == "Cast":
        node, index = next(iter(node.outputs[0].uses()))
    return node, index
