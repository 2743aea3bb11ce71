"""A plan's figures are those of the build, and what cannot be is refused in words."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from engines import Runtime, runtimes
from exporters import tokenizers
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.components.registry import COMPONENTS
from exporters.export import export_component, specify
from exporters.weights.bind import WeightFolder
from fluxdeploy.build.plan import ComponentPlan, Plan, make_plan, planner
from fluxdeploy.build.resolve import BuildRequest, resolve
from fluxdeploy.build.sizes import SizeRange
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.tensorfile import read_header
from fluxdeploy.demo import DEFAULT_CHECKPOINT, DEMO_CHECKPOINTS
from fluxdeploy.errors import BundleError, CheckpointError, UsageError
from fluxdeploy.machine import Memory

CPU = ("cpu",)
FULL = SizeRange((256, 256), (1024, 1024), (2048, 2048))


def runtime(name: str) -> Runtime:
    return runtimes(name)[0]


def by_name(plan: Plan) -> dict[str, ComponentPlan]:
    return {component.name: component for component in plan.components}


def plan_for(
    checkpoint: Checkpoint,
    out: Path,
    runtime: Runtime,
    targets: tuple[str, ...],
    precision: str = "bf16",
    component_precisions: Mapping[str, str] | None = None,
    sizes: SizeRange | None = None,
) -> Plan:
    request = BuildRequest(
        precision=precision,
        component_precision=component_precisions or {},
        sizes=sizes or SizeRange(),
    )
    return make_plan(resolve(request, checkpoint, runtime, targets), out)


@pytest.mark.parametrize("setting", [{"stochastic_sampling": True}, {"num_train_timesteps": 500}])
def test_a_scheduler_that_no_host_has_is_no_plan(
    tmp_path: Path, setting: Mapping[str, object]
) -> None:
    copy = shutil.copytree(DEMO_CHECKPOINTS[DEFAULT_CHECKPOINT], tmp_path / "checkpoint")
    config = copy / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | setting))
    with pytest.raises(CheckpointError, match=next(iter(setting))):
        plan_for(open_checkpoint(copy), tmp_path / "out", runtime("onnxruntime"), CPU)


def rtx(checkpoint: Checkpoint, out: Path, precision: str, *targets: str) -> Plan:
    return plan_for(checkpoint, out, runtime("tensorrt-rtx"), targets, precision, sizes=FULL)


@pytest.mark.parametrize(("component", "precision"), [("clip", "fp16"), ("t5", "int8-weights")])
def test_bytes_written_are_those_of_the_export(
    demo: Checkpoint, out: Path, component: str, precision: str
) -> None:
    planned = plan_for(
        demo, out, runtime("onnxruntime"), CPU, component_precisions={component: precision}
    )
    part = by_name(planned)[component]
    spec = specify(demo, COMPONENTS[component], precision, part.compute)
    exported = export_component(spec, WeightFolder(out / "weights"))
    tensors = [
        tensor for file in exported.weights for tensor in read_header(out / file).tensors.values()
    ]
    assert part.linked == 0
    assert part.written == sum(tensor.nbytes for tensor in tensors)


def test_a_bundle_takes_what_was_planned(demo: Checkpoint, demo_bundle: Path, out: Path) -> None:
    plan = plan_for(demo, out, runtime("onnxruntime"), CPU)
    checkpoint = {file.resolve().stat().st_size for file in demo.files}
    files = {record.path: record.size for _, record in open_bundle(demo_bundle).manifest.files()}
    weights = {path: size for path, size in files.items() if path.startswith("onnx/weights/")}
    assert plan.disk.written == plan.disk.engines == 0
    assert set(weights.values()) <= checkpoint, "every weight file is the checkpoint's own"
    assert sum(part.linked for part in plan.components) == sum(
        tensor.nbytes for part in demo.parts.values() for tensor in part.weights.values()
    )
    others = sum(files.values()) - sum(weights.values())
    assert others <= plan.disk.other <= 3 * others


def test_flux_dev_is_planned_in_a_moment(flux_dev: Checkpoint, out: Path) -> None:
    rtx(flux_dev, out, "bf16", "sm89")  # what is imported late is not counted
    tokenizers.canonical_tokenizer.cache_clear()  # of this folder's fixture
    started = time.process_time()
    plan = rtx(flux_dev, out, "fp8", "sm89")
    assert time.process_time() - started < 2
    parts = by_name(plan)
    assert parts["transformer"].parameters + parts["conditioner"].parameters == pytest.approx(
        11.90e9, rel=0.001
    )
    assert parts["t5"].parameters == pytest.approx(4.762e9, rel=0.001)
    assert not plan.impossible


def test_fp8_halves_the_transformer(flux_dev: Checkpoint, out: Path) -> None:
    wide, narrow = (by_name(rtx(flux_dev, out, p, "sm89")) for p in ("bf16", "fp8"))
    assert wide["transformer"].written == 0
    assert wide["transformer"].linked == 2 * wide["transformer"].parameters
    assert narrow["transformer"].linked == 0
    assert narrow["transformer"].written < 0.51 * wide["transformer"].linked
    assert narrow["transformer"].engine < 0.55 * wide["transformer"].engine
    assert narrow["conditioner"].written < 0.6 * wide["conditioner"].linked
    assert narrow["t5"].linked == wide["t5"].linked


def test_fp4_takes_nine_sixteenths_of_a_byte(flux_dev: Checkpoint, out: Path) -> None:
    fp8, fp4 = (by_name(rtx(flux_dev, out, p, "sm120")) for p in ("fp8", "fp4"))
    assert fp4["transformer"].compute == "bf16"
    assert fp4["transformer"].written == pytest.approx(
        9 / 16 * fp8["transformer"].written, rel=0.02
    )
    assert fp4["transformer"].engine < 0.6 * fp8["transformer"].engine
    assert fp4["conditioner"] == fp8["conditioner"]
    assert fp4["t5"].precision == "fp8-weights"


def test_int4_takes_nine_sixteenths_of_a_byte_and_is_not_widened(
    flux_dev: Checkpoint, out: Path
) -> None:
    fp8, int4 = (by_name(rtx(flux_dev, out, p, "sm89")) for p in ("fp8", "int4-weights"))
    assert int4["transformer"].written == pytest.approx(
        9 / 16 * fp8["transformer"].written, rel=0.02
    )
    assert int4["conditioner"].written < 0.6 * fp8["conditioner"].written
    assert int4["t5"].precision == "int8-weights"
    on_cpu = by_name(plan_for(flux_dev, out, runtime("onnxruntime"), CPU, "int4-weights"))
    # Scales of float32, which the product is in there; biases alone are widened.
    transformer = on_cpu["transformer"]
    assert transformer.resident == pytest.approx(transformer.written, rel=0.002)
    assert transformer.written == pytest.approx(5 / 8 * transformer.parameters, rel=0.02)


def test_fp4_is_not_for_onnx_runtime(demo: Checkpoint, out: Path) -> None:
    plan = plan_for(demo, out, runtime("onnxruntime"), CPU, "fp4")
    with pytest.raises(UsageError, match=r"^transformer: ONNX Runtime has no FP4.*; use fp8\.$"):
        plan.require_possible()


def test_memory_grows_with_the_picture_and_low_vram_takes_less(
    flux_dev: Checkpoint, out: Path
) -> None:
    plan = rtx(flux_dev, out, "fp8", "sm120")
    assert (plan.usual.image, plan.largest.image) == (4096, 16384)
    for part in plan.components:
        if part.name in ("transformer", "vae_decoder"):
            assert 2 < part.largest_activations / part.activations < 5, part.name
    for run in (plan.run, plan.largest_run):
        assert run.low_vram < run.all_open
    # The one scratch block is that of the decoder at 2048x2048.
    parts = by_name(plan)
    weights = sum(part.resident for part in plan.components if part.name != "vae_encoder")
    assert plan.largest_run.all_open == weights + parts["vae_decoder"].largest_activations


def test_cpu_sessions_hold_float32_weights(flux_dev: Checkpoint, out: Path) -> None:
    part = by_name(plan_for(flux_dev, out, runtime("onnxruntime"), CPU))["transformer"]
    assert (part.precision, part.compute) == ("fp32", "fp32")
    assert part.linked == 2 * part.parameters
    assert part.resident == 4 * part.parameters


@pytest.mark.parametrize(
    ("name", "precision", "holds"),
    [
        ("onnxruntime", "fp32", False),
        ("onnxruntime", "int8", False),
        ("onnxruntime", "fp16", True),
        ("onnxruntime", "fp8", True),  # Q/DQ around the products
    ],
)
def test_only_attention_that_is_not_fused_holds_its_scores(
    flux_dev: Checkpoint, out: Path, name: str, precision: str, holds: bool
) -> None:
    part = by_name(plan_for(flux_dev, out, runtime(name), CPU, precision))["transformer"]
    scores = 24 * (512 + 4096) ** 2 * 4
    assert (part.activations > 2 * scores) == holds


@pytest.mark.parametrize(
    ("precision", "targets", "says"),
    [
        ("fp8", ("sm86",), "conditioner, transformer: sm86 (Ampere) has no FP8"),
        ("bf16", ("sm75",), "no bfloat16"),
        ("fp8", ("sm120", "sm80"), "no FP8"),
        ("fp4", ("sm120", "sm89"), "transformer: sm89 (Ada) has no FP4 here"),
        # Around int8 an Ada GPU computes in bfloat16, and one engine serves both.
        ("int8", ("sm89", "sm75"), "no bfloat16"),
    ],
)
def test_what_a_gpu_has_not_is_impossible(
    demo: Checkpoint, out: Path, precision: str, targets: tuple[str, ...], says: str
) -> None:
    plan = plan_for(demo, out, runtime("tensorrt-rtx"), targets, precision)
    assert any(says in line for line in plan.problems), plan.problems
    with pytest.raises(UsageError):
        plan.require_possible()


def test_possible_plans_pass(demo: Checkpoint, out: Path) -> None:
    for precision in ("fp8", "int8", "bf16"):
        plan_for(
            demo, out, runtime("tensorrt-rtx"), ("sm89", "sm120"), precision
        ).require_possible()
    blackwell = "sm120", "sm121"
    plan_for(demo, out, runtime("tensorrt-rtx"), blackwell, "fp4").require_possible()
    with pytest.raises(UsageError, match="one --target"):
        plan_for(demo, out, runtime("onnxruntime"), ("cpu", "cuda")).require_possible()


def test_a_small_disk_is_refused(
    demo: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(demo, out, runtime("onnxruntime"), CPU, "int8")
    needed = plan.disk.needed
    _have_free(monkeypatch, needed)
    plan_for(demo, out, runtime("onnxruntime"), CPU, "int8").require_possible()
    _have_free(monkeypatch, needed - 1000)
    small = plan_for(demo, out, runtime("onnxruntime"), CPU, "int8")
    with pytest.raises(BundleError, match="free some space"):
        small.require_possible()
    # What a build that was cut off has made already is not needed twice.
    staged = out.parent / ".bundle.building" / "onnx" / "weights"
    staged.mkdir(parents=True)
    (staged / "transformer.int8-dynamic.safetensors").write_bytes(bytes(1000))
    plan_for(demo, out, runtime("onnxruntime"), CPU, "int8").require_possible()


def test_an_earlier_bundle_may_be_enough(
    demo: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(demo, out, runtime("onnxruntime"), CPU, "int8")
    engine = SimpleNamespace(runtime="onnxruntime", target="cpu")
    earlier = {
        part.name: SimpleNamespace(
            precision=part.precision, compute=part.compute, engines=(engine,)
        )
        for part in plan.components
    }
    monkeypatch.setattr(planner, "find_manifest", lambda _: SimpleNamespace(stems=lambda: earlier))
    _have_free(monkeypatch, plan.disk.needed - 1000)
    again = plan_for(demo, out, runtime("onnxruntime"), CPU, "int8")
    again.require_possible()
    assert any("earlier bundle" in line for line in again.warnings)
    engine.target = "cuda"
    with pytest.raises(BundleError):
        plan_for(demo, out, runtime("onnxruntime"), CPU, "int8").require_possible()


def _have_free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    usage = SimpleNamespace(total=10 * size, used=9 * size, free=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_files_of_another_disk_are_copied_once(
    demo: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "can_link", lambda file, folder: False)
    plan = plan_for(demo, out, runtime("onnxruntime"), CPU)
    assert plan.disk.copied == sum(file.stat().st_size for file in demo.files)


def test_little_memory_is_told(
    flux_dev: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "read_memory", lambda: Memory(56 << 30, 8 << 30, 8 << 30))
    cpu = plan_for(flux_dev, out, runtime("onnxruntime"), CPU)
    assert not cpu.shortages
    assert any("not every engine will be checked" in line for line in cpu.warnings)
    assert any("--low-vram" in line for line in cpu.warnings)
    engines = rtx(flux_dev, out, "bf16", "sm89")
    assert any("(engine)" in line and "close other programs" in line for line in engines.warnings)
    monkeypatch.setattr(planner, "read_memory", lambda: Memory(12 << 30, 8 << 30, 4 << 30))
    with pytest.raises(BundleError, match="more memory"):
        rtx(flux_dev, out, "bf16", "sm89").require_possible()


def test_emulation_is_told(demo: Checkpoint, out: Path) -> None:
    plan = plan_for(demo, out, runtime("onnxruntime"), CPU, "fp8")
    assert any("emulated" in line for line in plan.warnings)
    assert {"quantization", "calibration"} <= {phase.name for phase in plan.build}


def test_unknown_names_are_usage_errors(demo: Checkpoint, out: Path) -> None:
    with pytest.raises(UsageError, match="decoder"):
        plan_for(demo, out, runtime("onnxruntime"), CPU, component_precisions={"decoder": "fp32"})
    with pytest.raises(UsageError, match="vae_decoder"):
        plan_for(
            demo, out, runtime("onnxruntime"), CPU, component_precisions={"vae_decoder": "fp8"}
        )
