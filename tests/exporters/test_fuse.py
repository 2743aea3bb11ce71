"""Attention as ONNX Runtime's own operator: where it comes, and what it computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS
from exporters.components.run import run_reference
from exporters.graph.fuse import fuse_attention
from exporters.models.mmdit import HeadNorm
from fluxdeploy.bundle.manifest import RopeSpec
from fluxdeploy.sampling.rope import joint_ids, rope_tables
from tests.exporters.conftest import Exports
from tests.exporters.numbers import GRAPHS, SIZES, error, make_inputs, run
from tests.exporters.rounding import widened
from tests.support.checkpoints import SHAPES

BLOCKS = SHAPES["dev"].double + SHAPES["dev"].single
NORMS = 4 * SHAPES["dev"].double + 2 * SHAPES["dev"].single

ATTENTION = """
<ir_version: 10, opset_import: ["": 22]>
attention (
    float[B, T, 2, 8] query, float[B, T, 2, 8] key, float[B, T, 2, 8] value,
    float[T, 8] rope_cos, float[T, 8] rope_sin
) => (float[B, T, 16] joint)
<
    int64[1] one = {1}, int64[5] pairs = {0, 0, 2, 4, 2}, int64[4] heads = {0, 0, 2, 8},
    int64[3] flat = {0, 0, 16}, float scale = {0.4}
>
{
    cos = Unsqueeze (rope_cos, one)
    sin = Unsqueeze (rope_sin, one)
    q_pairs = Reshape (query, pairs)
    q_a, q_b = Split <axis = 4, num_outputs = 2> (q_pairs)
    q_minus_b = Neg (q_b)
    q_joined = Concat <axis = -1> (q_minus_b, q_a)
    q_turned = Reshape (q_joined, heads)
    q_with_cos = Mul (query, cos)
    q_with_sin = Mul (q_turned, sin)
    q_rotated = Add (q_with_cos, q_with_sin)
    k_pairs = Reshape (key, pairs)
    k_a, k_b = Split <axis = 4, num_outputs = 2> (k_pairs)
    k_minus_b = Neg (k_b)
    k_joined = Concat <axis = -1> (k_minus_b, k_a)
    k_turned = Reshape (k_joined, heads)
    k_with_cos = Mul (key, cos)
    k_with_sin = Mul (k_turned, sin)
    k_rotated = Add (k_with_cos, k_with_sin)
    q = Transpose <perm = [0, 2, 1, 3]> (q_rotated)
    k = Transpose <perm = [0, 2, 3, 1]> (k_rotated)
    v = Transpose <perm = [0, 2, 1, 3]> (value)
    q_scaled = Mul (q, scale)
    scores = MatMul (q_scaled, k)
    weights = Softmax <axis = -1> (scores)
    mixed = MatMul (weights, v)
    by_token = Transpose <perm = [0, 2, 1, 3]> (mixed)
    joint = Reshape (by_token, flat)
}
"""
"""Attention as the exporter writes it in float32, of two heads and with an odd scale."""


def operators(path: Path) -> Counter[tuple[str, str]]:
    nodes = onnx.load(path, load_external_data=False).graph.node
    return Counter((node.domain, node.op_type) for node in nodes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("component", ["transformer", "one_piece"])
def test_fused_attention_equals_pytorch(
    exports: Exports, opened: Checkpoint, component: str, size: tuple[int, ...]
) -> None:
    chain, weights = GRAPHS[component].source(opened, "fp32")
    inputs = make_inputs(opened, component, size)
    ((name, expected),) = run_reference(chain, weights, inputs).items()
    # The one-piece graph makes its RoPE tables in float32.
    bound = 2e-5 if component == "transformer" else 2e-4
    assert error(run(exports(component, "fp32", fused=True), inputs)[name], expected) < bound


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic"])
def test_every_block_has_one_attention_and_no_transposition(
    exports: Exports, precision: str
) -> None:
    path = exports("transformer", precision, fused=True)
    found = operators(path)
    assert found["com.microsoft", "MultiHeadAttention"] == BLOCKS
    assert found["com.microsoft", "RotaryEmbedding"] == 2 * BLOCKS
    assert not found["", "Softmax"]
    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    weights |= {n.output[0] for n in model.graph.node if set(n.input) & weights}
    turned = [node for node in model.graph.node if node.op_type == "Transpose"]
    assert {node.input[0] for node in turned} <= weights
    read = {name for node in model.graph.node for name in node.input} | {"velocity"}
    assert all(set(node.output) & read for node in model.graph.node), "a result nobody reads"


def test_fused_int8_computes_what_the_standard_graph_does(
    exports: Exports, opened: Checkpoint
) -> None:
    inputs = make_inputs(opened, "transformer", SIZES[1])
    expected = run(exports("transformer", "int8-dynamic"), inputs)["velocity"]
    found = run(exports("transformer", "int8-dynamic", fused=True), inputs)["velocity"]
    # A number that rounds the other way moves by a step of 8 bits.
    assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected)


def test_onnx_runtime_merges_the_norms_itself(exports: Exports, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(exports("transformer", "fp32", fused=True), options)
    found = operators(tmp_path / "optimized.onnx")
    assert found["", "SimplifiedLayerNormalization"] == NORMS
    assert not found["", "ReduceMean"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bits_have_the_operators_of_gpus(exports: Exports, precision: str) -> None:
    path = exports("transformer", precision, fused=True)
    found = operators(path)
    assert found["com.microsoft", "MultiHeadAttention"] == BLOCKS
    assert found["com.microsoft", "RotaryEmbedding"] == 2 * BLOCKS
    assert found["", "RMSNormalization"] == NORMS
    assert not found["", "Softmax"] + found["", "ReduceMean"]
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    for node in model.graph.node:
        if node.op_type in ("RMSNormalization", "RotaryEmbedding"):
            assert kinds[node.input[0]] == kinds[node.output[0]] == half
        if node.op_type == "MultiHeadAttention":
            assert {kinds[name] for name in (*node.input, *node.output)} == {half}


def test_the_norms_of_16_bits_compute_what_those_of_float32_do(
    exports: Exports, opened: Checkpoint, tmp_path: Path
) -> None:
    """In float32, which the CPU has all kernels for: the graph of fp16 with its types widened."""
    source = exports("transformer", "fp16", fused=True)
    onnx.save(widened(source), tmp_path / "wide.onnx")
    inputs = make_inputs(opened, "transformer", SIZES[1])
    expected = run(exports("transformer", "fp16"), inputs)["velocity"]
    found = run(tmp_path / "wide.onnx", inputs)["velocity"]
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_the_vae_keeps_no_scores(exports: Exports, opened: Checkpoint, component: str) -> None:
    path = exports(component, "fp32", fused=True)
    found = operators(path)
    assert found["com.microsoft", "MultiHeadAttention"] == 1
    assert not found["", "Softmax"]
    inputs = make_inputs(opened, component, SIZES[1])
    expected = run(exports(component, "fp32"), inputs)
    for name, values in run(path, inputs).items():
        assert error(values, expected[name]) < 1e-5


def test_other_components_stay_standard(exports: Exports) -> None:
    for component in set(COMPONENTS) - {"transformer", "vae_decoder", "vae_encoder"}:
        path = exports(component, "fp32", fused=True)
        assert {domain for domain, _ in operators(path)} == {""}


def fused(text: str) -> onnx.ModelProto:
    model = ir.from_onnx_text(text)
    fuse_attention(model)
    return ir.to_proto(model)


def test_heads_scale_and_rotation_are_those_of_the_standard_form(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(ATTENTION), tmp_path / "standard.onnx")
    onnx.save(fused(ATTENTION), tmp_path / "fused.onnx")
    assert operators(tmp_path / "fused.onnx")["com.microsoft", "MultiHeadAttention"] == 1
    cos, sin = rope_tables(joint_ids(3, 2, 2, 3), RopeSpec((2, 2, 4), 10000.0))
    random = np.random.RandomState(1)
    inputs = {
        name: random.standard_normal((2, 7, 2, 8)).astype(np.float32)
        for name in ("query", "key", "value")
    }
    inputs |= {"rope_cos": cos, "rope_sin": sin}
    expected = run(tmp_path / "standard.onnx", inputs)["joint"]
    assert error(run(tmp_path / "fused.onnx", inputs)["joint"], expected) < 1e-6


OTHER_FORMS = {
    "a bias": (
        "weights = Softmax <axis = -1> (scores)",
        "biased = Add (scores, scale) weights = Softmax <axis = -1> (biased)",
    ),
    "V in 8 bits": (
        "mixed = MatMul (weights, v)",
        "v_8 = QuantizeLinear (v, scale) v_wide = DequantizeLinear (v_8, scale)"
        "mixed = MatMul (weights, v_wide)",
    ),
    "a softmax over queries": ("Softmax <axis = -1>", "Softmax <axis = 2>"),
    "weights that are a result too": (
        "float[B, T, 16] joint",
        "float[B, T, 16] joint, float[B, 2, T, T] weights",
    ),
    "a scale that is computed": (
        "q_scaled = Mul (q, scale)",
        "factor = Exp (scale) q_scaled = Mul (q, factor)",
    ),
    "a scale for each channel": (
        "float scale = {0.4}",
        "float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}",
    ),
    "Q in another order": (
        "q = Transpose <perm = [0, 2, 1, 3]>",
        "q = Transpose <perm = [2, 0, 1, 3]>",
    ),
    "K in another order": ("<perm = [0, 2, 3, 1]>", "<perm = [2, 0, 3, 1]>"),
    "V in another order": (
        "v = Transpose <perm = [0, 2, 1, 3]>",
        "v = Transpose <perm = [2, 0, 1, 3]>",
    ),
    "heads that stay apart": (
        "by_token = Transpose <perm = [0, 2, 1, 3]>",
        "by_token = Transpose <perm = [0, 1, 2, 3]>",
    ),
    "K without RoPE": ("(k_rotated)", "(key)"),
    "pairs of halves": ("{0, 0, 2, 4, 2}", "{0, 0, 2, 2, 4}"),
    "a turn the other way": ("(q_minus_b, q_a)", "(q_a, q_minus_b)"),
    "tables for batches": ("int64[1] one = {1}", "int64[1] one = {0}"),
    "tables as they are": ("Unsqueeze (rope_sin, one)", "Identity (rope_sin)"),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_attention_in_another_form_stays_as_it_is(form: str) -> None:
    before, after = OTHER_FORMS[form]
    assert ATTENTION.count(before) == 1
    text = ATTENTION.replace(before, after)
    standard = ir.to_proto(ir.from_onnx_text(text))
    assert fused(text).SerializeToString(deterministic=True) == standard.SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_blocks_share_two_half_tables(exports: Exports, precision: str) -> None:
    path = exports("transformer", precision, fused=True)
    nodes = onnx.load(path, load_external_data=False).graph.node
    narrowed = {node.input[0]: node.output[0] for node in nodes if node.op_type == "Cast"}
    halves = []
    for table in ("rope_cos", "rope_sin"):
        (reader,) = [node for node in nodes if table in node.input]
        assert reader.op_type == "Slice"
        halves += [narrowed.get(name, name) for name in reader.output]
    rotations = [node for node in nodes if node.op_type == "RotaryEmbedding"]
    assert all(node.input[2:] == halves for node in rotations)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_norms_of_16_bits_have_the_epsilon_of_pytorchs(
    exports: Exports, tmp_path: Path, precision: str
) -> None:
    """Over numbers whose squares are as large as epsilon."""
    norm = HeadNorm(8)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x = 1e-3 * torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(2))
    expected = norm(x).detach().numpy()
    path = exports("transformer", precision, fused=True)
    nodes = onnx.load(path, load_external_data=False).graph.node
    norms = [node for node in nodes if node.op_type == "RMSNormalization"]
    for node in norms:
        sizes = zip([*node.input, *node.output], ([2, 3, 4, 8], [8], [2, 3, 4, 8]), strict=True)
        given, weight, result = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size)
            for name, size in sizes
        ]
        graph = onnx.helper.make_graph([node], "norm", [given, weight], [result])
        opset = onnx.helper.make_opsetid("", 23)
        model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
        onnx.save(model, tmp_path / "norm.onnx")
        inputs = {given.name: x.numpy(), weight.name: norm.weight.detach().numpy()}
        assert error(run(tmp_path / "norm.onnx", inputs)[result.name], expected) < 1e-6
    assert norms
