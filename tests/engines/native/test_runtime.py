"""The runtime of our own kernels: where it runs and builds, what it refuses, and who chooses it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines import (
    Availability,
    BuildSettings,
    EngineOptions,
    choose_builder,
    choose_runtime,
    choose_target,
    gpu,
    open_engine,
    runs_here,
    runtimes,
)
from engines.native import build as build_module
from engines.native import runtime as module
from engines.native.plan import Attention, Buffer, Linear, Packed, Part, Place, Plan
from engines.native.report import check_shape, describe, find_widened
from engines.native.runtime import Native
from engines.onnxruntime import OnnxRuntime
from fluxdeploy.bundle.manifest import EngineRecord
from fluxdeploy.errors import EngineError, FluxDeployError, MissingDependencyError, UsageError
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress
from tests.engines.conftest import INPUTS, RANGES, Make, engine_record, record, source

Pretend = Callable[..., None]

PACKAGES = ("cudnn", "nvidia.cudnn", "triton", "onnx_ir", "ml_dtypes")
ENGINE = EngineRecord("native", "2", "sm90", "tiny.engine", RANGES)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """`pretend(missing, driver, gpu)`: another machine than this one."""

    def make(
        missing: tuple[str, ...] = (),
        driver: bool = True,
        found: str | None = "sm90",
        cuda_python: bool = True,
    ) -> None:
        monkeypatch.setattr(module, "_has", lambda name: name not in missing)
        monkeypatch.setattr(module.ctypes.util, "find_library", lambda name: None)
        monkeypatch.setattr(gpu, "has_nvidia_driver", lambda: driver)
        monkeypatch.setattr(gpu, "has_cuda_python", lambda: cuda_python)
        monkeypatch.setattr(gpu, "compute_capability", lambda device=0: found)
        here = Availability(True, "")
        monkeypatch.setattr(OnnxRuntime, "availability", lambda self, target, device=0: here)

    return make


@pytest.mark.parametrize(
    ("machine", "detail"),
    [
        ({"missing": ("cudnn",)}, r"nvidia-cudnn-frontend is not installed: pip .*\[native\]'"),
        ({"missing": ("nvidia.cudnn",)}, r"there is no cuDNN library: pip install .*\[native\]'"),
        ({"driver": False}, "installed, but there is no NVIDIA driver"),
        ({"cuda_python": False}, r"cuda-python is not installed: pip install .*\[native\]'"),
        ({"found": None}, "there is an NVIDIA driver, but no GPU"),
        ({"found": "sm89"}, "the GPU is sm89, which native does not support"),
    ],
)
def test_why_it_cannot_run(pretend: Pretend, machine: dict[str, Any], detail: str) -> None:
    pretend(**machine)
    available = Native().availability("sm90")
    assert not available.ok
    assert re.search(detail, available.detail)
    with pytest.raises(FluxDeployError, match=f"transformer .*{detail}"):
        Native().open("transformer", record(ENGINE), ENGINE, Path("missing"), EngineOptions())


def test_a_cudnn_that_the_linker_finds_will_do(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(missing=("nvidia.cudnn",))
    monkeypatch.setattr(module.ctypes.util, "find_library", lambda name: f"lib{name}.so.9")
    assert Native().availability("sm90").ok


def test_an_engine_of_another_version_is_refused_before_it_is_read(pretend: Pretend) -> None:
    pretend()
    old = replace(ENGINE, runtime_version="0")
    with pytest.raises(EngineError, match=r"version 0 of native engines, .*: build the bu"):
        Native().open("transformer", record(old), old, Path("missing"), EngineOptions())


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("triton", r"triton, which is for Linux on x86-64, is not installed: .*\[native\]'"),
        ("onnx_ir", r"onnx-ir is not installed: .*\[export\]'"),
        ("ml_dtypes", r"ml_dtypes is not installed: .*\[export\]'"),
    ],
)
def test_building_takes_its_packages_and_no_gpu(pretend: Pretend, missing: str, words: str) -> None:
    pretend(missing=("cudnn", "nvidia.cudnn"), driver=False)
    assert Native().can_build("sm90").ok
    assert choose_builder("native", ["sm90"])[0].name == "native"
    pretend(missing=(missing,))
    assert re.search(words, Native().can_build("sm90").detail)
    with pytest.raises(EngineError, match=f"native on sm90: {words}"):
        choose_builder("native", ["sm90"])


def test_auto_takes_it_on_a_hopper_gpu_for_what_it_has(pretend: Pretend) -> None:
    pretend()
    assert choose_target()[0].name == "native"
    assert choose_target(precision="fp8")[0].name == "native"
    assert choose_target(precision="fp16")[0].name == "onnxruntime"
    assert choose_target("native", "fp16")[0].name == "native"


def test_without_a_gpu_it_is_what_builds_for_one(pretend: Pretend) -> None:
    pretend(driver=False)
    assert choose_runtime(targets=["sm90"], precision="fp8")[0].name == "native"
    assert choose_runtime(targets=["sm90"], precision="int8")[0].name == "tensorrt"


def test_without_onnx_runtime_on_a_gpu_nobody_has_the_others(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend()
    nowhere = Availability(False, "no CUDA provider")
    monkeypatch.setattr(OnnxRuntime, "availability", lambda self, target, device=0: nowhere)
    available = Native().availability("sm90")
    assert available.detail == "it leaves the other components to ONNX Runtime: no CUDA provider"


def test_what_it_computes_in() -> None:
    (native,) = runtimes("native")
    possible = {p for p in PRECISIONS if native.precision_problem("sm90", p) is None}
    assert possible == {"bf16", "fp8", "fp8-linears"}
    assert {native.compute("sm90", p) for p in possible} == {"bf16"}


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("fp32", "has no kernels for fp32; use bf16"),
        ("fp8-weights", "would widen the weights of fp8-weights; use fp8-linears or bf16"),
        ("int8", "has no kernels for int8; use fp8"),
    ],
)
def test_refusals_say_what_to_use(precision: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^transformer cannot be {precision}: native {words}"):
        build("transformer", precision, ("sm90",), tmp_path)


@pytest.mark.parametrize(
    ("component", "targets", "words"),
    [
        ("transformer", ("sm89",), "native has no target 'sm89'; its targets are sm90"),
        ("transformer", (), "native needs a target"),
        ("clip", ("sm90",), "engines of the transformer alone: clip runs in ONNX Runtime"),
    ],
)
def test_refused_before_any_work(
    component: str, targets: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        build(component, "bf16", targets, tmp_path)


def test_building_without_the_compiler(pretend: Pretend, tmp_path: Path) -> None:
    pretend(missing=("triton",))
    with pytest.raises(MissingDependencyError, match="native cannot build for sm90: triton"):
        build("transformer", "bf16", ("sm90",), tmp_path)


def build(component: str, precision: str, targets: tuple[str, ...], folder: Path) -> None:
    asked = source(component, precision, folder / "missing.onnx", INPUTS)
    settings = BuildSettings((RANGES,))
    Native().build(asked, targets, settings, folder / "e", Progress(quiet=True))


def test_the_other_components_are_opened_by_onnx_runtime_on_cuda(
    bundle: Make, pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend()
    opened: list[str] = []

    def open_any(runtime: Any, component: str, *others: Any) -> Any:
        opened.append(f"{runtime.name}: {component}")
        return SimpleNamespace()

    monkeypatch.setattr(OnnxRuntime, "availability", lambda *_: Availability(True, ""))
    for kind in (OnnxRuntime, Native):
        monkeypatch.setattr(kind, "open", open_any)
    made = native_bundle(bundle)
    for name in ("native", "auto"):
        for component in made.manifest.components:
            open_engine(made, component, name)
    assert opened == ["onnxruntime: tiny", "native: transformer"] * 2
    assert runs_here(r.engines for r in made.manifest.components.values())
    with pytest.raises(EngineError, match="--runtime onnxruntime: it has engines for native on s"):
        open_engine(made, "transformer", "onnxruntime")


@pytest.mark.parametrize("name", ["native", "auto"])
def test_a_bundle_that_cannot_run_here_says_what_is_missing(
    bundle: Make, pretend: Pretend, name: str
) -> None:
    pretend(missing=("cudnn",))
    made = native_bundle(bundle)
    assert not runs_here([made.manifest.components["transformer"].engines])
    words = f"no transformer engine that runs here with --runtime {name}: native on sm90: nvidia-c"
    with pytest.raises(EngineError, match=words):
        open_engine(made, "transformer", name)


def native_bundle(bundle: Make) -> Any:
    """A bundle of `tiny` for CUDA, and of a transformer for `native`."""
    made = bundle(engine_record("onnxruntime", "cuda"))
    tiny = made.manifest.components["tiny"]
    engine = replace(ENGINE, path="tiny.onnx")
    made.manifest.components["transformer"] = replace(tiny, engines=(engine,))
    return made


def plan(kind: Any = "fp8", head_dim: int = 32, inner: int = 64) -> Plan:
    """Two linears in one product, and attention, in `kind`."""
    buffers = tuple(Buffer(f"x{n}", "all", n * 64, kind) for n in (1, 3))
    parts = tuple(Part(name, scale=f"{name}.scale") for name in ("to_q", "to_k"))
    weight = Packed("qk.weight", (128, inner), kind, parts)
    product = Linear(Place("x1"), Place("x3"), "all", "qk.weight", "qk.bias", inner, 128, "plain")
    steps = (product, Attention(Place("x3"), Place("x1")))
    return Plan(64, head_dim, 6, buffers, steps, (weight,))


@pytest.mark.parametrize(
    ("precision", "kind", "asked", "words"),
    [
        ("fp8", "fp8", {}, None),
        ("bf16", "bf16", {}, None),
        ("fp8-linears", "bf16", {}, "2 more linears run in bf16 than were spared: of to_k, to_q"),
        ("fp8-linears", "bf16", {"weights_only": 1}, "1 more linears run .*: of to_k, to_q"),
        ("fp8-linears", "bf16", {"weights_only": 2}, None),
        ("fp8", "bf16", {"weights_only": 2}, "1 more attentions run in bf16 than were spared"),
        ("fp8", "bf16", {"weights_only": 2, "wide_attentions": 1}, None),
    ],
)
def test_what_is_wider_than_was_asked_is_told(
    precision: str, kind: str, asked: dict[str, int], words: str | None
) -> None:
    made = replace(source("transformer", precision, Path("x"), INPUTS), **asked)
    found = find_widened(plan(kind), made)
    assert found is None if words is None else re.search(words, found or "")


@pytest.mark.parametrize("strict", [False, True])
def test_a_build_tells_what_is_wider_and_strict_refuses_it(
    bundle: Make, pretend: Pretend, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    pretend()
    root, said = bundle().root, io.StringIO()
    written: list[Path] = []
    monkeypatch.setattr(build_module, "match", lambda model: plan("bf16"))
    monkeypatch.setattr(build_module, "compile_kernels", lambda plan, progress: {})
    monkeypatch.setattr(build_module, "works_metadata", lambda plan, kernels: {})
    monkeypatch.setattr(build_module, "write_engine", lambda path, *others: written.append(path))
    asked = source("transformer", "fp8-linears", root / "tiny.onnx", INPUTS)
    engine, report = root / "transformer.engine", root / "transformer.kernels.json"

    def build() -> tuple[Path, ...]:
        settings = BuildSettings((RANGES,), strict=strict)
        return Native().build(asked, ("sm90",), settings, engine, Progress(stream=said))

    if strict:
        with pytest.raises(EngineError, match=f"not the fp8-linears engine .* in {report}"):
            build()
        assert written == []
    else:
        assert build() == (engine, report)
        assert written == [engine]
        assert "2 more linears run in bf16" in said.getvalue()
    assert "2 more linears" in json.loads(report.read_text())["widened"]


def test_the_report_has_an_entry_a_step() -> None:
    linear, attention = json.loads(describe(plan(), None))["steps"]
    assert linear == {
        "what": "linear, plain",
        "rows": "all",
        "shape": [64, 128],
        "type": "fp8",
        "out": "fp8",
        "weights": ["to_q", "to_k"],
    }
    assert (attention["what"], attention["shape"]) == ("attention", [2, 32])


@pytest.mark.parametrize(
    ("width", "head_dim", "words"),
    [
        (96, 24, "its heads are 24 wide, and the kernels of native are for 16, 32, 64, 128; use"),
        (512, 256, "its heads are 256 wide"),
        (48, 16, "it is 48 wide, and the kernels of native are for multiples of 32; use --runtime"),
    ],
)
def test_sizes_that_no_kernel_has_are_refused_by_a_plan(
    width: int, head_dim: int, words: str
) -> None:
    found = Native().size_problem(width, head_dim)
    assert found is not None
    assert found.startswith(words)
    assert Native().size_problem(3072, 128) is None


def test_channels_that_no_kernel_has_are_refused_by_a_build() -> None:
    check_shape(plan(), "transformer")
    words = "native cannot build transformer: qk.weight has 72 channels in, .* multiples of 16"
    with pytest.raises(EngineError, match=words):
        check_shape(plan(inner=72), "transformer")


def test_what_can_run_here_and_not_be_built_is_left_to_others(pretend: Pretend) -> None:
    """On a machine of another processor there is no Triton, and ONNX Runtime works as before."""
    pretend(missing=("triton",))
    assert choose_target()[0].name == "native"
    assert choose_builder()[0].name == "onnxruntime"
    assert choose_runtime()[0].name == "onnxruntime"
    with pytest.raises(EngineError, match="native on sm90: triton, which is for Linux"):
        choose_builder("native")
