"""Exported transformers as plans: the numbers they give, and graphs that are no such thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto

from engines.emulate.graph import emulate
from engines.native.file import read_engine
from engines.native.match import match
from engines.native.pack import write_engine
from engines.native.plan import Attention, Convert, Linear, Norm, Plan
from fluxdeploy.errors import EngineError
from fluxdeploy.progress import Progress
from tests.engines.native.conftest import GRAPHS, Graphs
from tests.exporters.quantized.conftest import Quantized
from tests.support.native_plan import load_tensors, run_plan

SIZES = ((16, 24), (7, 5))
"""Text and image tokens."""


def matched(path: Path) -> Plan:
    return match(ir.load(path))


def make_inputs(plan: Plan, text: int, image: int) -> dict[str, Any]:
    """Inputs of one picture, with rows of the modulation that differ."""
    random = np.random.RandomState(text)
    channels = plan.buffer("hidden_states").columns
    angles = np.repeat(random.uniform(0, 30, (text + image, plan.head_dim // 2)), 2, axis=1)
    made = {
        "hidden_states": random.standard_normal((image, channels)),
        "context": random.standard_normal((text, plan.width)),
        "modulation": 0.3 * random.standard_normal((plan.modulation_rows, plan.width)),
        "rope_cos": np.cos(angles),
        "rope_sin": np.sin(angles),
    }
    return {name: values.astype(np.float32) for name, values in made.items()}


def without_rounding(data: bytes) -> bytes:
    """An emulated graph that keeps all of float32 in its activations."""
    model = onnx.load_model_from_string(data)
    stored = {tensor.name for tensor in model.graph.initializer}
    # Weights stay as they are.
    weights = {node.output[0] for node in model.graph.node if node.input[0] in stored}
    narrow = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for node in model.graph.node:
        wide = node.op_type == "DequantizeLinear" and node.input[0] in narrow
        if wide or node.op_type == "QuantizeLinear":
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
        elif node.op_type == "Cast" and node.input[0] not in weights:
            node.attribute[0].i = TensorProto.FLOAT
    return bytes(model.SerializeToString())


def opened_graph(path: Path, data: bytes) -> Callable[[dict[str, Any]], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Any]) -> Any:
        given = {k: v if k.startswith("rope") else v[None] for k, v in inputs.items()}
        return session.run(None, given)[0][0]

    return run


def distance(found: Any, expected: Any) -> float:
    """The difference's root mean square, as a share of the expected one's."""
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize("name", GRAPHS)
def test_a_plan_has_the_numbers_of_its_graph(graphs: Graphs, tmp_path: Path, name: str) -> None:
    """Without rounding they are the same; with it a plan is no further from them than the graph."""
    path = graphs(name)
    model = ir.load(path)
    plan = match(model)
    write_engine(tmp_path / "engine", plan, model, {}, {}, Progress(quiet=True))
    file = read_engine(tmp_path / "engine")
    assert file.plan == replace(plan, packed=())
    tensors = load_tensors(file)
    emulated = emulate(path.read_bytes())
    exact, rounded = (opened_graph(path, data) for data in (without_rounding(emulated), emulated))
    # Weights that are quantized and multiplied in 16 bits are rounded to those where the graph has
    # quantized inputs beside them.
    # The graph's products of two dequantized values take the weights as they are; in 16 bits the
    # plan rounds them.
    close = 0.02 if name in ("linears", "smoothed") else 1e-4
    for text, image in SIZES:
        inputs = make_inputs(plan, text, image)
        expected = exact(inputs)
        assert distance(run_plan(plan, tensors, inputs, exact=True), expected) < close
    noise = distance(rounded(inputs), expected)
    assert distance(run_plan(plan, tensors, inputs), expected) < 1.5 * noise


def kinds(plan: Plan) -> list[str]:
    """The linears whose products are in 8 bits, by their names, and attentions as `attention`."""
    found = []
    for step in plan.steps:
        if isinstance(step, Linear) and step.scale is not None:
            found.append(step.weight.removesuffix(".weight"))
        elif isinstance(step, Attention) and plan.buffer(step.x.buffer).kind == "fp8":
            found.append("attention")
    return found


DOUBLE = [f"double.{i}.{name}" for i in range(2) for name in ("qkv", "out", "up", "down")]
SINGLE = [f"single.{i}.{name}" for i in range(2) for name in ("in", "out")]
EIGHT_BITS = {
    "bf16": [],
    "fp8": [*DOUBLE, *SINGLE, *4 * ["attention"]],
    "fp8-linears": [*DOUBLE, *SINGLE],
    "fp8-weights": [],
    # Of the first block of each kind, only the MLP's first linear is in one group with no other.
    "linears": ["double.0.up", *DOUBLE[4:], *SINGLE[2:], *2 * ["attention"]],
    "attentions": [*DOUBLE, *SINGLE, *2 * ["attention"]],
    "smoothed": [
        *(name for name in DOUBLE if name != "double.0.down"),
        *SINGLE[1:],
        *4 * ["attention"],
    ],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_8_bits_are_for_whole_groups_and_what_reads_them(graphs: Graphs, name: str) -> None:
    """A linear is in 8 bits where its whole group is, an attention where what reads it is too."""
    plan = matched(graphs(name))
    assert sorted(kinds(plan)) == sorted(EIGHT_BITS[name])
    converts = [step for step in plan.steps if isinstance(step, Convert)]
    between = [step for step in converts if plan.buffer(step.out.buffer).kind == "fp8"]
    # Attention in 16 bits before a projection in 8.
    assert len(between) == {"fp8-linears": 4, "attentions": 2}.get(name, 0)


def test_streams_have_scales_of_their_own(graphs: Graphs) -> None:
    plan = matched(graphs("fp8-linears"))
    first = next(step for step in plan.steps if isinstance(step, Norm))
    assert first.scale[0] != first.scale[1]
    factors = {part.factor for part in packed(plan, "double.0.qkv.scale")}
    assert factors == set(first.scale)


def test_both_streams_read_an_attention_in_8_bits_with_one_scale(graphs: Graphs) -> None:
    plan = matched(graphs("fp8"))
    attention = next(step for step in plan.steps if isinstance(step, Attention))
    scales = [part.factor for part in packed(plan, "double.0.out.scale")]
    assert scales == [attention.out_scale] * 2
    (apart,) = [
        step.scale
        for step in matched(graphs("fp8-linears")).steps[:9]
        if isinstance(step, Convert) and step.rows == "all"
    ]
    assert attention.out_scale == max(apart)


def packed(plan: Plan, name: str) -> Any:
    return next(each.parts for each in plan.packed if each.name == name)


def test_a_node_that_is_not_known_is_named(graphs: Graphs) -> None:
    """Each operator in turn, and at least every seventh node."""
    model = ir.load(graphs("fp8"))
    seen: set[str] = set()
    for index, node in enumerate(model.graph):
        if node.op_type in seen and index % 7:
            continue
        seen.add(node.op_type)
        original, node.op_type = node.op_type, "Mystery"
        with pytest.raises(EngineError) as refused:
            match(model)
        node.op_type = original
        assert f"{node.name} (Mystery)" in str(refused.value)
        assert "--runtime onnxruntime" in str(refused.value)
    match(model)


def test_a_node_that_leads_nowhere_is_named(graphs: Graphs) -> None:
    model = ir.load(graphs("bf16"))
    model.graph.append(ir.node("Relu", [model.graph.inputs[0]], name="beside/Relu"))
    with pytest.raises(EngineError, match=r"beside/Relu \(Relu\), which the native runtime does"):
        match(model)


def test_no_constant_is_passed_over(graphs: Graphs) -> None:
    """Another number is another plan, or none."""
    model = ir.load(graphs("bf16"))
    plan = match(model)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor):
            continue
        value.const_value = ir.tensor(tensor.numpy() + tensor.numpy().dtype.type(1))
        try:
            assert match(model) != plan, value.name
        except EngineError:
            pass
        value.const_value = tensor
    assert match(model) == plan


def test_other_numbers_are_refused_by_name(quantized: Quantized, graphs: Graphs) -> None:
    with pytest.raises(EngineError, match="computes in FLOAT .*bfloat16 alone"):
        match(ir.load(quantized("fp8")))
    model = ir.load(graphs("bf16"))
    weight = model.graph.initializers["proj_out.weight"]
    weight.dtype = ir.DataType.INT8
    with pytest.raises(EngineError, match=r"holds proj_out.weight in INT8.*FP8 \(E4M3\) alone"):
        match(model)


def test_another_interface_is_refused(graphs: Graphs) -> None:
    model = ir.load(graphs("bf16"))
    model.graph.inputs[2].name = "timestep"
    with pytest.raises(EngineError, match="velocity of hidden_states, context, timestep"):
        match(model)
