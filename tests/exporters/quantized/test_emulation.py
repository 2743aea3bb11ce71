"""What quantized graphs compute in ONNX Runtime, against the same rounding written in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

from exporters.calibrate.ranges import ActivationRanges
from exporters.calibrate.trajectory import Sample, start_samples
from exporters.checkpoint import Checkpoint
from exporters.components.chain import Chain, Stage
from exporters.components.registry import COMPONENTS
from exporters.components.run import run_reference, run_samples
from exporters.export import export_component, specify
from exporters.models import mmdit
from exporters.weights.bind import WeightFolder
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress
from tests.exporters.quantized.conftest import LINEARS, SHORT, TEXT, Quantized
from tests.exporters.quantized.test_quantized_graphs import Graph

Array = NDArray[np.generic]

ON_CPUS = tuple(n for n, row in PRECISIONS.items() if row.quantization and n != "fp4")


def run(path: Path, inputs: dict[str, Array], extra: Iterable[str] = ()) -> dict[str, Array]:
    """The outputs of a graph, and `extra` float32 values inside it."""
    model = onnx.load(path, load_external_data=False)
    for name in extra:
        value = onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        model.graph.output.append(value)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, setting in {
        # Without it the runtime rewrites FP8 around float32 to something that it then refuses.
        "session.disable_quant_qdq": "1",
        # x86 without VNNI saturates sums of two 8-bit products otherwise.
        "session.x64quantprecision": "1",
        "session.model_external_initializers_file_folder_path": str(path.parent),
    }.items():
        options.add_session_config_entry(key, setting)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def to_fp8(x: Tensor, scale: Tensor | float) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def to_int8(x: Tensor, scale: Tensor | float) -> Tensor:
    return (x / scale).round().clamp(-128, 127) * scale


def to_dynamic(x: Tensor) -> Tensor:
    """DynamicQuantizeLinear as the ONNX specification has it, and back."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round().clamp(0, 255)
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


def to_int4(weight: Tensor) -> Tensor:
    """Blocks of 32 numbers of a row, each with the best of three scales, found in float64."""
    rows, columns = weight.shape
    blocks = weight.new_zeros(rows, -(-columns // 32) * 32).double()
    blocks[:, :columns] = weight
    blocks = blocks.view(rows, -1, 32)
    whole = torch.maximum(blocks.amax(2) / 7, blocks.amin(2) / -8)[..., None]
    found, least = blocks, torch.full_like(whole, torch.inf)
    for reach in (1.0, 0.93, 0.86):
        numbers = (blocks / (whole * reach)).round().clamp(-8, 7)
        scale = (numbers * blocks).sum(2, keepdim=True) / numbers.square().sum(2, keepdim=True)
        error = (blocks - numbers * scale).square().sum(2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        rounded = (blocks / scale).round().clamp(-8, 7) * scale
        found = torch.where(better, rounded, found)
    return found.float().view(rows, -1)[:, :columns]


class Emulation:
    """The float32 pieces with rounded weights, inputs and attention."""

    def __init__(self, precision: str, ranges: ActivationRanges) -> None:
        self.how, self.ranges = PRECISIONS[precision].quantization, ranges
        if self.how.format != "int4":
            self.to_8_bits = {"fp8": to_fp8, "int8": to_int8}[self.how.format]
            self.end = {"fp8": 448.0, "int8": 127.0}[self.how.format]
            self.headroom = {"fp8": 2.0, "int8": 1.2}[self.how.format]
        self.scope = ""

    def enter(self, stage: Stage) -> None:
        self.scope = stage.scope

    def install(self, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
        def hook(name: str, linear: nn.Linear, inputs: Any, output: Tensor) -> Tensor | None:
            name = self.scope + name
            if name not in LINEARS:
                return None
            return self.product(name, inputs[0], linear.weight) + linear.bias

        def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            return self.attention(f"{self.scope}attn", query * scale, key.mT, value)

        for piece in chain.pieces:
            for name, module in piece.module.named_modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(functools.partial(hook, name))
        if self.how.attention:
            monkeypatch.setattr(mmdit, "attention", attention)

    def product(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        """x Wᵀ"""
        if self.how.format == "int4":
            return x @ to_int4(weight).T
        weight = self.to_8_bits(weight, weight.abs().amax(1, keepdim=True) / self.end)
        if self.how.activations == "dynamic":
            x = to_dynamic(x)
        elif self.how.activations == "static":
            x = self.to_8_bits(x, self.headroom * self.ranges.inputs[name] / self.end)
        return x @ weight.T

    def attention(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(Q K) V, with a scaled query and a transposed key."""
        query = to_fp8(query, self.ranges.queries[name] / 448)
        key = to_fp8(key, self.ranges.keys[name] / 448)
        value = to_fp8(value, 2 * self.ranges.values[name] / 448)
        return to_fp8(torch.softmax(query @ key, -1), 1 / 448) @ value


@pytest.fixture(scope="module")
def sample(opened: Checkpoint) -> Sample:
    return start_samples(opened, SHORT, Progress(quiet=True))[1]


def distance(found: Any, expected: Any) -> float:
    """|found - expected| / |expected|"""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def ends(graph: Graph, linear: str) -> tuple[str, str]:
    """The values that a linear reads and, but for its bias, writes."""
    product = graph.product(linear)
    x = graph.unrounded(product.input[0])
    if product.op_type == "MatMulInteger":
        (product,) = graph.users[product.output[0]]
        (product,) = graph.users[product.output[0]]
    return x, product.output[0]


@pytest.mark.parametrize("precision", ON_CPUS)
def test_every_product_is_the_emulations(
    quantized: Quantized,
    opened: Checkpoint,
    ranges: ActivationRanges,
    sample: Sample,
    precision: str,
) -> None:
    """Each on the inputs that it had: over the whole network one value that rounds the other way
    changes which way the next ones round."""
    graph = Graph(quantized(precision))
    emulation = Emulation(precision, ranges)
    names = {linear: ends(graph, linear) for linear in LINEARS}
    mixes = {}
    if emulation.how.attention:
        for attention, softmax in graph.softmaxes.items():
            mixed = graph.through_casts(softmax, forwards=True)
            factors = graph.attention(softmax).values()
            mixes[attention] = [*map(graph.unrounded, factors), mixed.output[0]]
    wanted = {name for group in (*names.values(), *mixes.values()) for name in group}
    values = run(quantized(precision), sample.inputs(0), sorted(wanted))
    found = {name: torch.from_numpy(np.array(values[name])) for name in wanted}
    weights = opened.part("transformer").weights
    for linear, (x, y) in names.items():
        stored = weights[f"{linear}.weight"]
        weight = torch.from_numpy(stored.read().reshape(stored.shape))
        expected = emulation.product(linear, found[x], weight)
        assert 1e-3 < distance(found[y], found[x] @ weight.T) < 0.15, linear
        # Of a search in float64 a number in a million rounds the other way.
        near = 1e-3 if emulation.how.format == "int4" else 1e-5
        assert distance(found[y], expected) < near, linear
    for attention, (query, key, softmax, value, mixed) in mixes.items():
        q, k, v = found[query], found[key], found[value]
        exact = torch.softmax(q @ k, -1)
        # The softmax is of Q and K in 8 bits.
        assert distance(found[softmax], exact) > 1e-3, attention
        expected = emulation.attention(attention, q, k, v)
        assert 1e-3 < distance(found[mixed], exact @ v) < 0.2, attention
        assert distance(found[mixed], expected) < 2e-3, attention


@pytest.mark.parametrize("precision", ON_CPUS)
def test_the_velocity_is_as_noisy_as_the_emulations(
    quantized: Quantized,
    opened: Checkpoint,
    ranges: ActivationRanges,
    sample: Sample,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    chain, weights = COMPONENTS["transformer"].source(opened, "fp32")
    inputs = sample.inputs(0)
    exact = run_reference(chain, weights, inputs)["velocity"]
    emulation = Emulation(precision, ranges)
    emulation.install(chain, monkeypatch)
    emulated = run_samples(chain, weights, [inputs], emulation.enter)[0]["velocity"]
    found = run(quantized(precision), inputs)["velocity"]
    noise = distance(emulated, exact)
    assert 1e-3 < noise < 0.3
    assert distance(found, exact) == pytest.approx(noise, rel=0.5)
    assert distance(found, emulated) < noise


def test_the_conditioner_is_quantized_by_its_weights_alone(
    opened: Checkpoint, tmp_path: Path
) -> None:
    folder = WeightFolder(tmp_path / "weights")
    spec = specify(opened, COMPONENTS["conditioner"], "fp8-weights", "fp32")
    exported = export_component(spec, folder)
    # The AdaLN linears: two of a double-stream block and one of a single-stream one.
    assert exported.quantized == 6
    chain, weights = COMPONENTS["conditioner"].source(opened, "fp32")
    random = np.random.RandomState(5)
    inputs: dict[str, Array] = {}
    for spec in chain.inputs:
        shape = [{"B": 2, "S": TEXT, "N": 3}[d] if isinstance(d, str) else d for d in spec.shape]
        inputs[spec.name] = random.uniform(0, 1, shape).astype(np.float32)
    expected = run_reference(chain, weights, inputs)
    found = run(tmp_path / exported.path, inputs)
    assert 1e-3 < distance(found["modulation"], expected["modulation"]) < 0.05
    assert distance(found["context"], expected["context"]) < 1e-5
    # The last two rows are the final AdaLN's.
    final = distance(found["modulation"][..., -2:, :], expected["modulation"][..., -2:, :])
    assert final < 1e-5
