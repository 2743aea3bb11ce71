"""16 bits between operators where other networks join, with side paths, and quantized weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest

from exporters.checkpoint import Checkpoint
from exporters.checkpoint.controlnet import with_controlnets
from exporters.checkpoint.ip_adapter import with_ip_adapter
from exporters.components.registry import components_of
from exporters.components.run import run_samples
from exporters.components.side_paths import run_side_paths
from exporters.export import ExportSpec, export_component, specify
from exporters.weights.bind import WeightFolder
from tests.exporters.conftest import export_fused
from tests.exporters.numbers import SIZES, Array, inputs_of
from tests.exporters.rounding import run_rounded, widened
from tests.exporters.test_narrow import distance, typed
from tests.support.checkpoints import SHAPES, make_controlnet, make_ip_adapter

NETWORKS = ("ip_adapter", "residuals", "controlnet", "side_paths")
QUANTIZED = ("fp8-weights", "int4-weights")
"""Precisions of the transformer by itself."""

SIZE = SIZES[1]

Joined = Callable[[str], Checkpoint]
Made = Callable[..., Path]
"""`made(network, precision, casts=False)`: the fused graph, and with casts as it is traced."""


@pytest.fixture(scope="session")
def joined(tmp_path_factory: pytest.TempPathFactory, opened: Checkpoint) -> Joined:
    """The checkpoint that a network is of, or with what joins it."""

    @cache
    def join(network: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp(network)
        if network == "ip_adapter":
            return with_ip_adapter(opened, make_ip_adapter(folder, SHAPES["dev"]), None)
        if network in ("residuals", "controlnet"):
            path = make_controlnet(folder, SHAPES["dev"], double=1, single=1, modes=3)
            return with_controlnets(opened, [path])
        return opened

    return join


def spec_of(network: str, checkpoint: Checkpoint, precision: str, compute: str) -> ExportSpec:
    name = "controlnet" if network == "controlnet" else "transformer"
    spec = specify(checkpoint, components_of(checkpoint)[name], precision, compute)
    return spec.with_side_paths() if network == "side_paths" else spec


@pytest.fixture(scope="session")
def made(shared_folder: Any, joined: Joined, remembered_traces: Path) -> Made:
    def make(network: str, precision: str, casts: bool = False) -> Path:
        # As ONNX Runtime on CUDA has it: float16 around quantized weights.
        spec = spec_of(network, joined(network), precision, "fp16")
        folder = shared_folder.entry(
            f"narrow-{network}-{precision}-{casts}",
            lambda target: export_fused(spec, target, fused=True, casts=casts),
        )
        return Path(folder) / f"{spec.name}.onnx"

    return make


def given_to(network: str, checkpoint: Checkpoint) -> tuple[ExportSpec, dict[str, Array]]:
    """The network in float32, and inputs that are as large as those of a picture."""
    spec = spec_of(network, checkpoint, "fp32", "fp32")
    inputs = inputs_of(spec.chain, checkpoint, SIZE)
    # A side path adds a part of what its linear gives.
    return spec, {n: 0.2 * x if n.startswith("lora_") else x for n, x in inputs.items()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("network", NETWORKS)
def test_it_is_as_near_to_pytorch_as_the_graph_with_casts(
    made: Made, joined: Joined, network: str, precision: str
) -> None:
    spec, inputs = given_to(network, joined(network))
    before = run_side_paths(spec.chain, inputs)
    (exact,) = run_samples(spec.chain, spec.weights, [inputs], before=before)
    narrow = run_rounded(made(network, precision), inputs)
    wide = run_rounded(made(network, precision, casts=True), inputs)
    for name, expected in exact.items():
        assert distance(narrow[name], expected) < 1.6 * distance(wide[name], expected), name


@pytest.mark.parametrize("network", [*NETWORKS, *QUANTIZED])
def test_in_float32_it_is_exact(made: Made, joined: Joined, network: str) -> None:
    """Whatever is rounded, it computes the same."""
    precision = network if network in QUANTIZED else "bf16"
    _, inputs = given_to(network, joined(network))
    found, expected = (
        run_widened(made(network, precision, casts=casts), inputs) for casts in (False, True)
    )
    for name, values in expected.items():
        assert distance(found[name], values) < 1e-5, name


def run_widened(path: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    # Products of weights in 4 bits would round their inputs to 8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(
        widened(path).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize("precision", QUANTIZED)
def test_it_rounds_around_quantized_weights_as_with_casts(
    made: Made, joined: Joined, precision: str
) -> None:
    _, inputs = given_to(precision, joined(precision))
    exact = run_widened(made(precision, precision, casts=True), inputs)["velocity"]
    narrow = run_rounded(made(precision, precision), inputs)["velocity"]
    wide = run_rounded(made(precision, precision, casts=True), inputs)["velocity"]
    assert distance(narrow, exact) < 1.6 * distance(wide, exact)


@pytest.mark.parametrize("network", [*NETWORKS, *QUANTIZED])
def test_every_norm_takes_its_modulation(made: Made, network: str) -> None:
    precision = network if network in QUANTIZED else "bf16"
    nodes, kinds = typed(made(network, precision))
    half = onnx.TensorProto.BFLOAT16 if precision == "bf16" else onnx.TensorProto.FLOAT16
    norms = [node for node in nodes if node.op_type == "LayerNormalization"]
    assert norms
    assert all(len(node.input) == 3 for node in norms)
    turned = [node for node in nodes if node.op_type == "RotaryEmbedding"]
    assert {kinds[name] for node in turned for name in node.output} == {half}
    assert Counter(n.op_type for n in nodes)["RMSNormalization"] >= len(turned)


@pytest.mark.parametrize("network", [*NETWORKS, *QUANTIZED])
def test_other_weights_in_its_graph_are_one_made_from_nothing(
    made: Made, joined: Joined, network: str, tmp_path: Path
) -> None:
    precision = network if network in QUANTIZED else "bf16"
    base = made(network, precision)
    spec = spec_of(network, joined(network), precision, "fp16")
    export_component(spec, WeightFolder(tmp_path / "weights"), fused=True, earlier=base)
    assert (tmp_path / base.name).read_bytes() == base.read_bytes()
