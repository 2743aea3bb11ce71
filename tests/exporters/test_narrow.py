"""16 bits between the operators of a graph: where casts are left, and what it computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from engines import EngineOptions
from engines.emulate.runtime import Emulate
from engines.onnxruntime import OnnxRuntimeEngine
from exporters.checkpoint import Checkpoint
from exporters.components.run import run_reference
from exporters.graph.narrow import keep_16_bits
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord
from fluxdeploy.precision import PRECISIONS
from tests.exporters.conftest import Exports
from tests.exporters.numbers import GRAPHS, SIZES, make_inputs
from tests.exporters.rounding import run_rounded, widened
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
    nodes, kinds = typed(exports("transformer", "bf16", fused=True))
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
    nodes, kinds = typed(exports(component, precision, fused=True))
    norms = [node for node in nodes if node.op_type == "LayerNormalization"]
    assert len(norms) == 4 * SHAPES["dev"].double + SHAPES["dev"].single + 1
    assert all(len(node.input) == 3 for node in norms)
    # FP16 has its residual stream in float32, whose first norm reads the fp16 of a linear.
    streams = Counter(kinds[node.input[0]] for node in norms)
    assert streams[KINDS[precision]] == {"bf16": len(norms), "fp16": 1}[precision]
    heads = [node for node in nodes if node.op_type == "RMSNormalization"]
    assert len(heads) == NORMS
    assert {kinds[name] for node in heads for name in node.output} == {KINDS[precision]}


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic"])
def test_float32_stays_as_it_is(exports: Exports, precision: str) -> None:
    fused = exports("transformer", precision, fused=True)
    assert fused.read_bytes() == exports("transformer", precision, casts=True).read_bytes()


@pytest.mark.parametrize("precision", list(KINDS))
@pytest.mark.parametrize("component", sorted(set(GRAPHS) - set(COMPONENTS)))
def test_other_components_stay_as_they_are(
    exports: Exports, component: str, precision: str
) -> None:
    fused = exports(component, precision, fused=True)
    assert fused.read_bytes() == exports(component, precision, casts=True).read_bytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision", list(KINDS))
@pytest.mark.parametrize("component", COMPONENTS)
def test_it_is_as_near_to_float32_as_the_graph_with_casts(
    exports: Exports, opened: Checkpoint, component: str, precision: str, size: tuple[int, ...]
) -> None:
    chain, weights = GRAPHS[component].source(opened, "fp32")
    inputs = make_inputs(opened, component, size)
    ((name, exact),) = run_reference(chain, weights, inputs).items()
    narrow = run_rounded(exports(component, precision, fused=True), inputs)[name]
    wide = run_rounded(exports(component, precision, casts=True), inputs)[name]
    # Either is some hundredths away from float32 with such small random weights.
    assert distance(narrow, exact) < 1.6 * distance(wide, exact)
    if component == "transformer":
        gate = PRECISIONS[precision].max_error
        assert np.abs(narrow - exact).max() < gate * np.abs(exact).max()


@pytest.mark.parametrize("precision", list(KINDS))
def test_a_cpu_emulates_it(exports: Exports, opened: Checkpoint, precision: str) -> None:
    path = exports("transformer", precision, fused=True)
    chain, weights = GRAPHS["transformer"].source(opened, "fp32")
    inputs = make_inputs(opened, "transformer", SIZES[1])
    exact = run_reference(chain, weights, inputs)["velocity"]
    engine = EngineRecord("emulate", "", "cpu", path.name, {})
    record = ComponentRecord(
        "", precision, precision, chain.inputs, chain.outputs, (), (engine,), None
    )
    emulated = Emulate().open("transformer", record, engine, path.parent, EngineOptions(1))
    assert isinstance(emulated, OnnxRuntimeEngine)
    found = emulated.session.run(["velocity"], inputs)[0]
    rounded = run_rounded(path, inputs)["velocity"]
    assert 0 < distance(found, exact) < 1.6 * distance(rounded, exact)


MODULATED = """
<ir_version: 10, opset_import: ["": 22]>
norm (
    bfloat16[B, T, 4] x, float[B, 1, 4] scale, float[B, 1, 4] shift
) => (bfloat16[B, T, 4] result)
<float[4] ones = {1, 1, 1, 1}>
{
    wide = Cast <to = 1> (x)
    normal = LayerNormalization <axis = -1> (wide, ones)
    scaled = Mul (normal, scale)
    shifted = Add (scaled, shift)
    narrow = Cast <to = 16> (shifted)
    result = Neg (narrow)
}
"""


@pytest.mark.parametrize(
    ("change", "merged"),
    [
        (("", ""), True),
        (("{1, 1, 1, 1}", "{1, 2, 1, 1}"), False),
        (("(wide, ones)", "(wide, ones, ones)"), False),
        (("axis = -1", "axis = 1"), False),
    ],
)
def test_a_norm_with_a_scale_of_its_own_keeps_it(change: tuple[str, str], merged: bool) -> None:
    model = onnx.parser.parse_model(MODULATED.replace(*change))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    keep_16_bits(model)
    (norm,) = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert (len(norm.inputs) == 3 and norm.inputs[0] is model.graph.inputs[0]) == merged
    assert (ir.to_proto(model).SerializeToString(deterministic=True) != before) == merged


def optimized(path: Path, tmp_path: Path) -> tuple[onnxruntime.InferenceSession, set[str]]:
    """The graph in float32 with all that ONNX Runtime merges, and the operators it has then."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(widened(path).SerializeToString(), options)
    model = onnx.load(tmp_path / "optimized.onnx")
    return session, {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("size", SIZES)
def test_in_float32_it_is_exact_however_onnx_runtime_merges_it(
    exports: Exports, opened: Checkpoint, tmp_path: Path, size: tuple[int, ...]
) -> None:
    """A norm after a sum is one for whose scale its merged operator has one axis."""
    path = exports("transformer", "bf16", fused=True)
    inputs = make_inputs(opened, "transformer", size)
    session, operators = optimized(path, tmp_path)
    assert "SkipLayerNormalization" not in operators
    assert "LayerNormalization" in operators
    wide, _ = optimized(exports("transformer", "bf16", casts=True), tmp_path)
    (expected,), (found,) = wide.run(None, inputs), session.run(None, inputs)
    assert distance(found, expected) < 1e-5
