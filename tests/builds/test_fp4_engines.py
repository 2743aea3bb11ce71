"""FP4 engines at FLUX.1's width, really built by TensorRT-RTX for GPUs that are not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

from engines import BuildSettings, EngineSource, runtimes
from engines.tensorrt.fusion import FusionReport
from exporters.calibrate.ranges import ActivationRanges, attentions, linears
from exporters.calibrate.trajectory import default_calibration
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.components.registry import COMPONENTS
from exporters.export import Exported, export_component, specify
from exporters.synthetic.sparse_checkpoint import flux_of_depth, write_random_checkpoint
from exporters.weights.bind import WeightFolder
from fluxdeploy.build.build import build
from fluxdeploy.build.plan.footprint import weigh
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle.manifest import DimensionRange
from fluxdeploy.bundle.tensorfile import read_header
from fluxdeploy.errors import UsageError
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress
from tests.support.shared_folder import SharedFolder

pytestmark = pytest.mark.usefixtures("remembered_traces")

QUIET = Progress(quiet=True)
TOKENS = {"L": DimensionRange(256, 4096, 16384), "S": DimensionRange(256, 512, 512)}
SIZES = TOKENS | {"B": DimensionRange(1, 1, 1), "T": DimensionRange(512, 4608, 16896)}
LINEARS, MERGED = 12 + 5, 10


@pytest.fixture(scope="session")
def full_width(shared_folder: SharedFolder) -> Checkpoint:
    """FLUX.1's width and heads, one block of each kind, and the smallest of all else."""

    def make(folder: Path) -> None:
        write_random_checkpoint(folder, flux_of_depth(1, 1))

    return open_checkpoint(str(shared_folder.entry("full-width", make)))


def make_engine(checkpoint: Checkpoint, folder: Path, target: str) -> tuple[Exported, FusionReport]:
    spec = specify(checkpoint, COMPONENTS["transformer"], "fp4")
    chain = spec.chain
    ranges = ActivationRanges(
        "",
        default_calibration(checkpoint),
        dict.fromkeys(linears(chain), 8.0),
        *(dict.fromkeys(attentions(chain), 8.0) for _ in range(3)),
    )
    weights = WeightFolder(folder / "weights")
    spec = spec.with_layers(replace(spec.layers, ranges=ranges))
    exported = export_component(spec, weights)
    source = EngineSource(
        "transformer",
        PRECISIONS["fp4"],
        "bf16",
        folder / exported.path,
        chain.inputs,
        exported.quantized,
        exported.attentions,
        one_head=False,
        weight_bytes=exported.weight_bytes,
    )
    (runtime,) = runtimes("tensorrt-rtx")
    engine, kernels = runtime.build(
        source, (target,), BuildSettings((SIZES,)), folder / "transformer.engine", QUIET
    )
    report = FusionReport.from_json(kernels.read_text())
    assert report.engine_bytes == engine.stat().st_size
    return exported, report


def test_full_width_runs_in_fp4_with_fp8_attention(full_width: Checkpoint, tmp_path: Path) -> None:
    """Every product of a block in FP4, those of one input in one kernel, and 9/16 byte a weight."""
    exported, built = make_engine(full_width, tmp_path, "sm120")
    assert built.gemms == {"fp4": LINEARS, "bf16": 2}
    assert built.fused_attentions == {"fp8": 2}
    kernels = [k for k in built.kernels if "fp4" in k.inputs and "fp4" in k.constants]
    assert len(kernels) == MERGED
    assert {kernel.kind for kernel in kernels} == {"gemm"}

    planned = weigh(specify(full_width, COMPONENTS["transformer"], "fp4"))
    stored = [read_header(tmp_path / file) for file in exported.weights]
    assert planned.written == sum(t.nbytes for file in stored for t in file.tensors.values())
    narrow = planned.graph - 2 * (planned.parameters - planned.quantized)
    assert narrow == pytest.approx(9 / 16 * planned.quantized, rel=1e-5)
    assert built.engine_bytes < 0.31 * 2 * planned.parameters


@pytest.mark.parametrize("targets", [("sm89",), ("sm120", "sm89"), ("sm121", "sm86"), ("cpu",)])
def test_fp4_is_refused_elsewhere_before_any_work(tmp_path: Path, targets: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="has no FP4"):
        build(BuildRequest(precision="fp4", targets=targets), tmp_path / "bundle", QUIET)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


@pytest.mark.parametrize("component", ["conditioner", "t5", "clip", "vae_decoder"])
def test_only_the_transformer_is_in_fp4(tmp_path: Path, component: str) -> None:
    request: dict[str, Any] = {"component_precision": {component: "fp4"}, "targets": ("sm120",)}
    with pytest.raises(UsageError, match=f"'fp4' is not one of {component}'s"):
        build(BuildRequest(**request), tmp_path / "bundle", QUIET)
