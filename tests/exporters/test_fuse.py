"""Attention as ONNX Runtime's own operator: where it comes, and what it computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from exporters.checkpoint import Checkpoint
from exporters.export import COMPONENTS, component_source
from exporters.reference import run_reference
from tests.exporters.conftest import Exports
from tests.exporters.numbers import SIZES, error, make_inputs, run
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
    chain, weights = component_source(
        opened, "transformer", "fp32", split=component == "transformer"
    )
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


def test_16_bits_and_other_components_stay_standard(exports: Exports) -> None:
    graphs = [("transformer", "fp16"), *((name, "fp32") for name in COMPONENTS)]
    graphs.remove(("transformer", "fp32"))
    for component, precision in graphs:
        path = exports(component, precision, fused=True)
        assert {domain for domain, _ in operators(path)} == {""}
