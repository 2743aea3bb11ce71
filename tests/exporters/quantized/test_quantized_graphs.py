"""Quantized graphs: which products run in 8 bits, with which scales, and what is left alone."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from exporters.calibrate.ranges import ActivationRanges
from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS
from fluxdeploy.errors import ExportError
from fluxdeploy.precision import PRECISIONS
from tests.exporters.quantized.conftest import ATTENTIONS, JOINT, LINEARS, ExportInto, Quantized

COMPUTE = {"fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16}
NARROW = {"fp8": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8}
QUANTIZED = {n: row.quantization for n, row in PRECISIONS.items() if row.quantization}
EIGHT_BITS = [precision for precision, how in QUANTIZED.items() if how.format in NARROW]
GRAPHS = [(precision, compute) for precision in EIGHT_BITS for compute in COMPUTE]

graphs = pytest.mark.parametrize(("precision", "compute"), GRAPHS)


class Graph:
    """A transformer's nodes by what they write and read."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path, load_external_data=False)
        self.nodes = self.model.graph.node
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.producers = {name: node for node in self.nodes for name in node.output}

    @cached_property
    def users(self) -> dict[str, list[onnx.NodeProto]]:
        users: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                users.setdefault(name, []).append(node)
        return users

    def product(self, linear: str) -> onnx.NodeProto:
        """The MatMul or MatMulInteger of a linear."""
        (node,) = self.users[f"{linear}.weight"]
        while not node.op_type.startswith("MatMul"):
            (node,) = self.users[node.output[0]]
        return node

    def quantizer(self, value: str) -> onnx.NodeProto | None:
        """The node that narrowed a value, where it was narrowed."""
        node = self.producers.get(value)
        if node is not None and node.op_type == "DequantizeLinear":
            node = self.producers.get(node.input[0])
        kinds = ("QuantizeLinear", "DynamicQuantizeLinear")
        return node if node is not None and node.op_type in kinds else None

    def unrounded(self, value: str) -> str:
        """A value as it was before it was narrowed."""
        quantizer = self.quantizer(value)
        return value if quantizer is None else quantizer.input[0]

    def scale(self, quantizer: onnx.NodeProto | None) -> float:
        """The scale of a QuantizeLinear, which its DequantizeLinear has to share."""
        assert quantizer is not None
        assert quantizer.op_type == "QuantizeLinear"
        (wide,) = self.users[quantizer.output[0]]
        assert wide.op_type == "DequantizeLinear"
        assert wide.input[1] == quantizer.input[1]
        return float(onnx.numpy_helper.to_array(self.initializers[quantizer.input[1]]))

    def through_casts(self, node: onnx.NodeProto, forwards: bool) -> onnx.NodeProto:
        while True:
            if forwards:
                (node,) = self.users[node.output[0]]
            else:
                node = self.producers[node.input[0]]
            if node.op_type not in ("Cast", "QuantizeLinear", "DequantizeLinear"):
                return node

    def attention(self, softmax: onnx.NodeProto) -> dict[str, str]:
        """What softmax(Q Kᵀ) V multiplies."""
        scores = self.through_casts(softmax, forwards=False)
        mixed = self.through_casts(softmax, forwards=True)
        assert scores.op_type == mixed.op_type == "MatMul"
        names = (*scores.input, *mixed.input)
        return dict(zip(("queries", "keys", "softmax", "values"), names, strict=True))

    @property
    def softmaxes(self) -> dict[str, onnx.NodeProto]:
        """Softmax nodes by the attention they belong to."""
        found = {}
        for node in self.nodes:
            if node.op_type == "Softmax":
                block = ".".join(node.output[0].split(".")[:2])
                found[f"{block}.attn"] = node
        return found


def rounded(value: float, compute: str) -> float:
    dtype: type[np.generic] = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16}[compute]
    return float(np.asarray(value, dtype))


@graphs
def test_exactly_the_large_linears_are_in_8_bits(
    quantized: Quantized, opened: Checkpoint, precision: str, compute: str
) -> None:
    graph = Graph(quantized(precision, compute))
    how = QUANTIZED[precision]
    weights = opened.part("transformer").weights
    narrow = {n for n, t in graph.initializers.items() if t.data_type == NARROW[how.format]}
    assert narrow == {f"{linear}.weight" for linear in LINEARS}
    for name in narrow:
        tensor, scales = graph.initializers[name], graph.initializers[f"{name}.scale"]
        rows, columns = weights[name].shape
        assert list(tensor.dims) == [columns, rows]
        assert list(scales.dims) == [rows]
        assert tensor.data_location == scales.data_location == TensorProto.EXTERNAL
        (reader,) = graph.users[name]
        if how.activations == "dynamic":
            assert reader.op_type == "MatMulInteger"
            assert scales.data_type == TensorProto.FLOAT
        else:
            assert reader.op_type == "DequantizeLinear"
            assert reader.input[1] == scales.name
            assert [(a.name, a.i) for a in reader.attribute] == [("axis", 1)]
            assert scales.data_type == COMPUTE[compute]


@graphs
def test_graph_is_standard_and_the_rest_is_untouched(
    quantized: Quantized, precision: str, compute: str
) -> None:
    """The checker has seen every graph: nothing that it refuses is written."""
    graph = Graph(quantized(precision, compute))
    assert [(entry.domain, entry.version) for entry in graph.model.opset_import] == [("", 22)]
    assert {node.domain for node in graph.nodes} == {""}
    names = [name for node in graph.nodes for name in node.output]
    assert len(set(names)) == len(names)
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)
    read = {name for node in graph.nodes for name in node.input}
    assert set(graph.initializers) <= read
    outputs = {value.name for value in graph.model.graph.output}
    assert all((read | outputs).intersection(node.output) for node in graph.nodes)
    for name in ("x_embedder", "proj_out"):
        assert graph.initializers[f"{name}.weight"].data_type == COMPUTE[compute]
        product = graph.product(name)
        assert product.op_type == "MatMul"
        assert graph.quantizer(product.input[0]) is None
    for tensor in graph.initializers.values():
        if tensor.name.endswith(".bias") or ".norm_" in tensor.name:
            assert tensor.data_type == COMPUTE[compute]


def groups() -> list[set[str]]:
    """Linears that read the same value."""
    found = []
    for i in range(2):
        double, single = f"transformer_blocks.{i}.", f"single_transformer_blocks.{i}."
        found.append({f"{double}attn.to_{n}" for n in "qkv"})
        found.append({f"{double}attn.add_{n}_proj" for n in "qkv"})
        found.append({single + name for name in JOINT if name != "proj_out"})
    together = set.union(*found)
    return found + [{linear} for linear in LINEARS - together]


@graphs
def test_linears_that_share_an_input_share_its_scale(
    quantized: Quantized, ranges: ActivationRanges, precision: str, compute: str
) -> None:
    graph = Graph(quantized(precision, compute))
    how = QUANTIZED[precision]
    seen = set()
    for group in groups():
        nodes = [graph.quantizer(graph.product(linear).input[0]) for linear in group]
        if how.activations is None:
            assert nodes == [None] * len(group)
            continue
        (name,) = {node.name for node in nodes if node is not None}
        assert None not in nodes
        seen.add(name)
        if how.activations == "static":
            headroom, end = {"fp8": (2.0, 448), "int8": (1.2, 127)}[how.format]
            largest = headroom * ranges.inputs[next(iter(group))]
            assert graph.scale(nodes[0]) == rounded(largest / end, compute)
            assert nodes[0] is not None
            scale = graph.initializers[nodes[0].input[1]]
            assert scale.data_type == COMPUTE[compute]
    assert len(seen) == (len(groups()) if how.activations else 0)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("precision", ["fp8", "fp4"])
def test_attention_has_scales_in_all_four_places(
    quantized: Quantized, ranges: ActivationRanges, precision: str, compute: str
) -> None:
    graph = Graph(quantized(precision, compute))
    assert graph.softmaxes.keys() == ATTENTIONS
    for attention, softmax in graph.softmaxes.items():
        expected = {
            "queries": ranges.queries[attention] / 448,
            "keys": ranges.keys[attention] / 448,
            "softmax": 1 / 448,
            "values": 2 * ranges.values[attention] / 448,
        }
        for place, value in graph.attention(softmax).items():
            quantizer = graph.quantizer(value)
            assert quantizer is not None, (attention, place)
            assert graph.scale(quantizer) == rounded(expected[place], compute), place
            assert graph.initializers[quantizer.input[1]].data_type == COMPUTE[compute]


@pytest.mark.parametrize("precision", sorted(QUANTIZED.keys() - {"fp8", "fp4"}))
def test_attention_is_left_alone_by_the_others(quantized: Quantized, precision: str) -> None:
    graph = Graph(quantized(precision, "bf16"))
    assert graph.softmaxes.keys() == ATTENTIONS
    for softmax in graph.softmaxes.values():
        for value in graph.attention(softmax).values():
            assert graph.quantizer(value) is None


@pytest.mark.parametrize("layer", ["transformer_blocks.1.ff.net.2", "transformer_blocks.1.attn"])
def test_a_range_that_is_missing_is_named(
    export_into: ExportInto,
    ranges: ActivationRanges,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layer: str,
) -> None:
    kind = "values" if layer.endswith("attn") else "inputs"
    monkeypatch.delitem(getattr(ranges, kind), layer)
    with pytest.raises(ExportError, match=f"lack {layer}: measure"):
        export_into(tmp_path, "fp8")


def test_a_scale_is_never_zero(
    export_into: ExportInto,
    ranges: ActivationRanges,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither for an activation that always was, nor where rounding would make it one."""
    dead, tiny = "transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff.net.2"
    monkeypatch.setitem(ranges.inputs, dead, 0.0)
    monkeypatch.setitem(ranges.inputs, tiny, 1e-45)
    graph = Graph(export_into(tmp_path, "fp8-linears"))
    for linear in (dead, tiny):
        scale = graph.scale(graph.quantizer(graph.product(linear).input[0]))
        assert math.isfinite(1 / np.float32(scale))
        assert scale > 0


def policy(component: str, linears: tuple[str, ...]) -> list[str]:
    return [linear for linear in linears if COMPONENTS[component].is_quantized(linear)]


def test_policy_spares_small_and_sensitive_linears() -> None:
    modulation = [
        "transformer_blocks.18.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.37.norm.linear",
    ]
    spared = ["x_embedder", "context_embedder", "proj_out", "norm_out.shift", "norm_out.scale"]
    spared += [
        f"time_text_embed.{name}_embedder.linear_{i}"
        for name in ("timestep", "guidance", "text")
        for i in (1, 2)
    ]
    everything = (*LINEARS, *modulation, *spared)
    assert set(policy("transformer", everything)) == LINEARS
    assert policy("conditioner", everything) == modulation
    attention = "encoder.block.23.layer.0.SelfAttention"
    linears = tuple(f"{attention}.{name}" for name in "qkvo")
    linears += tuple(f"encoder.block.0.layer.1.DenseReluDense.{n}" for n in ("wi_0", "wi_1", "wo"))
    others = ("shared", f"{attention}.relative_attention_bias", "encoder.final_layer_norm")
    assert policy("t5", linears + others) == list(linears)
    assert policy("vae_decoder", ("decoder.mid_block.attentions.0.to_q", *everything)) == []


def weights_of(path: Path) -> dict[str, NDArray[np.generic]]:
    graph = onnx.load(path).graph
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


@pytest.mark.parametrize("precision", ["fp8-weights", "int8-weights"])
def test_weights_come_back(quantized: Quantized, opened: Checkpoint, precision: str) -> None:
    """bytes · scales is the checkpoint's weight, to the last step of the type."""
    found = weights_of(quantized(precision))
    stored = opened.part("transformer").weights
    for linear in LINEARS:
        name = f"{linear}.weight"
        weight = stored[name].read().reshape(stored[name].shape)
        scales = found[f"{name}.scale"].astype(np.float32)
        error = np.abs((found[name].astype(np.float32) * scales).T - weight)
        largest = np.abs(weight).max(1, keepdims=True)
        if precision == "int8-weights":
            assert (error <= 0.5001 * largest / 127).all()
        else:
            assert (error <= np.maximum(np.abs(weight) / 16, largest / 448 / 1024) * 1.001).all()
