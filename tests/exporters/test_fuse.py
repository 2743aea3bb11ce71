"""Attention as ONNX Runtime's own operator: where it comes, and what it computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS
from exporters.components.run import run_reference
from tests.exporters.conftest import Exports
from tests.exporters.numbers import GRAPHS, SIZES, error, make_inputs, run
from tests.support.checkpoints import SHAPES

BLOCKS = SHAPES["dev"].double + SHAPES["dev"].single
NORMS = 4 * SHAPES["dev"].double + 2 * SHAPES["dev"].single


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
    for node in model.graph.node:
        if node.op_type == "RMSNormalization":
            assert kinds[node.input[0]] == onnx.TensorProto.FLOAT


def test_the_norms_of_16_bits_compute_what_those_of_float32_do(
    exports: Exports, opened: Checkpoint, tmp_path: Path
) -> None:
    """In float32, which the CPU has all kernels for: the graph of fp16 with its types widened."""
    source = exports("transformer", "fp16", fused=True)
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT16:
                attribute.i = onnx.TensorProto.FLOAT
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "wide.onnx")
    inputs = make_inputs(opened, "transformer", SIZES[1])
    expected = run(exports("transformer", "fp16"), inputs)["velocity"]
    found = run(tmp_path / "wide.onnx", inputs)["velocity"]
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


def test_other_components_stay_standard(exports: Exports) -> None:
    for component in set(COMPONENTS) - {"transformer"}:
        path = exports(component, "fp32", fused=True)
        assert {domain for domain, _ in operators(path)} == {""}
