"""Graphs for GPUs as `--runtime emulate` runs them, against the same rounding in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from engines import EngineOptions
from engines.emulate import graph as module
from engines.emulate.runtime import Emulate
from engines.onnxruntime import OnnxRuntimeEngine
from exporters.calibrate.trajectory import Sample, start_samples
from exporters.check.readback import read_attentions, read_linears
from exporters.checkpoint import Checkpoint
from exporters.components.chain import Chain
from exporters.components.registry import COMPONENTS
from exporters.components.run import run_reference
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord
from fluxdeploy.progress import Progress
from tests.exporters.quantized.conftest import LINEARS, SHORT, Quantized
from tests.exporters.quantized.test_emulation import distance, ends
from tests.exporters.quantized.test_emulation import run as run_in_onnx_runtime
from tests.exporters.quantized.test_quantized_graphs import QUANTIZED, Graph

Run = Callable[..., dict[str, Any]]
"""`run(path, *names)`: values inside a graph, and its velocity, all float32."""


@pytest.fixture(scope="module")
def sample(opened: Checkpoint) -> Sample:
    return start_samples(opened, SHORT, Progress(quiet=True))[1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, opened: Checkpoint, sample: Sample) -> Run:
    chain, _ = COMPONENTS["transformer"].source(opened, "bf16")

    def run(path: Path, *names: str) -> dict[str, Any]:
        emulate = module.emulate

        def watched(data: bytes) -> bytes:
            model = onnx.load_model_from_string(emulate(data))
            for name in names:
                value = onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                model.graph.output.append(value)
            return bytes(model.SerializeToString())

        engine = EngineRecord("emulate", "", "cpu", path.name, {})
        record = ComponentRecord(
            "", "fp8", "bf16", chain.inputs, chain.outputs, (), (engine,), None
        )
        with monkeypatch.context() as patch:
            patch.setattr(module, "emulate", watched)
            made = Emulate().open("transformer", record, engine, path.parent, EngineOptions(1))
        assert isinstance(made, OnnxRuntimeEngine)
        wanted = ["velocity", *names]
        values = made.session.run(wanted, sample.inputs(0))
        return dict(zip(wanted, map(torch.from_numpy, values), strict=True))

    return run


def to_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def assert_rounded(found: Tensor, expected: Tensor, name: str) -> None:
    """Equal in bfloat16, but where sums of another order are on the two sides of a middle."""
    assert torch.equal(found, to_bf16(found)), name
    assert (found == to_bf16(expected)).float().mean() > 0.97, name
    assert distance(found, expected) < 2**-8, name


def source(graph: Graph, value: str) -> str:
    """What a dequantized value was made from."""
    narrow = graph.producers[value]
    if narrow.op_type == "DequantizeLinear":
        value = graph.producers[narrow.input[0]].input[0]
    return value


@pytest.mark.parametrize("precision", QUANTIZED)
def test_every_product_has_the_numbers_of_its_precision(
    quantized: Quantized, run: Run, precision: str
) -> None:
    path = quantized(precision, "bf16")
    graph, linears = Graph(path), read_linears(path)
    names = {}
    for linear in LINEARS:
        x, y = ends(graph, linear)
        names[linear] = source(graph, x), y
    found = run(path, *sorted({name for pair in names.values() for name in pair}))
    activations = QUANTIZED[precision].activations
    for linear, (x, y) in names.items():
        weight = linears[linear].dequantized()
        expected = linears[linear].narrow(found[x]) @ (weight if activations else to_bf16(weight))
        if activations == "dynamic":  # in float32 up to here
            assert distance(found[y], expected) < 1e-5, linear
        else:
            assert_rounded(found[y], expected, linear)


@pytest.mark.parametrize("precision", ["fp8", "fp4"])
def test_attention_has_the_numbers_of_fp8(quantized: Quantized, run: Run, precision: str) -> None:
    path = quantized(precision, "bf16")
    graph, scales = Graph(path), read_attentions(path)
    names = {}
    for attention, softmax in graph.softmaxes.items():
        factors = [source(graph, value) for value in graph.attention(softmax).values()]
        mixed = graph.through_casts(softmax, forwards=True)
        scores = graph.through_casts(softmax, forwards=False)
        names[attention] = [*factors, scores.output[0], mixed.output[0]]
    found = run(path, *sorted({name for group in names.values() for name in group}))
    for attention, group in names.items():
        query, key, softmax, value, scores, mixed = (found[name] for name in group)
        how = scales[attention]
        emulate = how.numbers.emulate
        expected = emulate(query, how.query) @ emulate(key, how.key)
        assert_rounded(scores, expected, attention)
        expected = emulate(softmax, how.softmax) @ emulate(value, how.value)
        assert_rounded(mixed, expected, attention)


def test_fp4_weights_and_inputs_are_those_of_the_format(quantized: Quantized, run: Run) -> None:
    path = quantized("fp4", "bf16")
    graph, linears = Graph(path), read_linears(path)
    products = {linear: graph.product(linear).input for linear in LINEARS}
    values = {name for inputs in products.values() for name in inputs}
    values |= {source(graph, inputs[0]) for inputs in products.values()}
    found = run(path, *sorted(values))
    for linear, (x, weight) in products.items():
        assert torch.equal(found[weight], linears[linear].dequantized()), linear
        narrow = linears[linear].narrow(found[source(graph, x)])
        assert torch.equal(found[x], narrow), linear


@pytest.mark.parametrize("precision", ["fp8", "int8-dynamic"])
def test_what_onnx_runtime_runs_itself_is_the_same(
    quantized: Quantized, run: Run, sample: Sample, precision: str
) -> None:
    path = quantized(precision, "fp32")
    usual = torch.from_numpy(run_in_onnx_runtime(path, sample.inputs(0))["velocity"])
    assert distance(run(path)["velocity"], usual) < 2e-3


def run_in_bf16(chain: Chain, weights: Any, inputs: Any) -> Any:
    """The chain in PyTorch's bfloat16."""
    values = {name: torch.from_numpy(np.array(array)) for name, array in inputs.items()}
    for stage in chain.stages:
        parameters = {}
        for name, parameter in stage.piece.module.named_parameters():
            stored = weights[stage.scope + name].read().reshape(parameter.shape)
            parameters[name] = torch.from_numpy(stored).to(torch.bfloat16)
        with torch.no_grad():
            made = torch.func.functional_call(
                stage.piece.module, parameters, tuple(values[name] for name in stage.reads)
            )
        outputs = made if isinstance(made, tuple) else (made,)
        values.update(zip(stage.writes, outputs, strict=True))
    return values["velocity"]


def test_bf16_is_as_near_to_pytorchs_bf16_as_that_is_to_float32(
    quantized: Quantized, run: Run, opened: Checkpoint, sample: Sample
) -> None:
    inputs = sample.inputs(0)
    found = run(quantized("bf16", "bf16"))["velocity"]
    narrow, weights = COMPONENTS["transformer"].source(opened, "bf16")
    expected = run_in_bf16(narrow, weights, inputs)
    exact, _ = COMPONENTS["transformer"].source(opened, "fp32")
    reference = torch.from_numpy(np.array(run_reference(exact, weights, inputs)["velocity"]))
    noise = distance(expected, reference)
    assert 1e-3 < noise < 0.1
    assert distance(found, expected) < 1.2 * noise
    assert distance(found, reference) == pytest.approx(noise, rel=0.4)
