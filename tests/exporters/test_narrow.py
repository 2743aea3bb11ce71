"""16 bits between the operators of a graph: where casts are left, and what it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from exporters.checkpoint import Checkpoint
from exporters.components.run import run_reference
from fluxdeploy.precision import PRECISIONS
from tests.exporters.conftest import Exports
from tests.exporters.numbers import GRAPHS, SIZES, make_inputs, run
from tests.exporters.rounding import run_rounded
from tests.support.checkpoints import SHAPES

KINDS = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16}
NORMS = 4 * SHAPES["dev"].double + 2 * SHAPES["dev"].single
COMPONENTS = ["transformer", "one_piece"]


def distance(found: object, expected: object) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def typed(path: Path) -> tuple[list[onnx.NodeProto], dict[str, int]]:
    """Nodes, and the types of all values between them."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return list(model.graph.node), kinds


def test_bf16_casts_inputs_and_outputs_alone(exports: Exports) -> None:
    nodes, kinds = typed(exports("transformer", "bf16", narrow=True))
    makers = {name: node for node in nodes for name in node.output}
    for node in nodes:
        if node.op_type != "Cast":
            continue
        maker = makers.get(node.input[0])
        # A half table of RoPE is a slice of an input.
        early = maker is None or maker.op_type == "Slice"
        assert early or node.output[0] == "velocity", node.name
    for node in nodes:
        if node.op_type in ("LayerNormalization", "RMSNormalization", "Mul", "MultiHeadAttention"):
            assert {kinds[name] for name in (*node.input, *node.output)} == {KINDS["bf16"]}
        if node.op_type == "RotaryEmbedding":
            assert kinds[node.input[0]] == kinds[node.output[0]] == KINDS["bf16"]


@pytest.mark.parametrize("precision", list(KINDS))
@pytest.mark.parametrize("component", COMPONENTS)
def test_norms_take_the_modulation(exports: Exports, component: str, precision: str) -> None:
    nodes, kinds = typed(exports(component, precision, narrow=True))
    norms = [node for node in nodes if node.op_type == "LayerNormalization"]
    assert len(norms) == 4 * SHAPES["dev"].double + SHAPES["dev"].single + 1
    assert all(len(node.input) == 3 for node in norms)
    # FP16 has its residual stream in float32.
    stream = {"bf16": KINDS["bf16"], "fp16": onnx.TensorProto.FLOAT}[precision]
    assert {kinds[node.input[0]] for node in norms} == {stream}
    heads = [node for node in nodes if node.op_type == "RMSNormalization"]
    assert len(heads) == NORMS
    assert {kinds[name] for node in heads for name in node.output} == {KINDS[precision]}


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic"])
def test_float32_stays_as_it_is(exports: Exports, precision: str) -> None:
    fused = exports("transformer", precision, fused=True)
    assert exports("transformer", precision, narrow=True).read_bytes() == fused.read_bytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision", list(KINDS))
@pytest.mark.parametrize("component", COMPONENTS)
def test_it_is_as_near_to_float32_as_the_graph_with_casts(
    exports: Exports, opened: Checkpoint, component: str, precision: str, size: tuple[int, ...]
) -> None:
    chain, weights = GRAPHS[component].source(opened, "fp32")
    inputs = make_inputs(opened, component, size)
    ((name, exact),) = run_reference(chain, weights, inputs).items()
    narrow = run_rounded(exports(component, precision, narrow=True), inputs)[name]
    wide = run_rounded(exports(component, precision, fused=True), inputs)[name]
    print(component, precision, size, distance(narrow, exact), distance(wide, exact))
    assert distance(narrow, exact) < 1.5 * distance(wide, exact)
    assert np.abs(narrow - exact).max() < PRECISIONS[precision].max_error * np.abs(exact).max()


def test_onnx_runtime_leaves_its_norms_as_they_are(exports: Exports, tmp_path: Path) -> None:
    """A sum before a norm it would merge into an operator whose scale has one axis."""
