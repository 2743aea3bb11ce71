"""The TensorRT runtimes: what is available, what is refused, and in which order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import (
    AUTO,
    BuildSettings,
    EngineOptions,
    choose_builder,
    choose_runtime,
    choose_target,
)
from engines import gpu as gpus
from engines.tensorrt import runtime as module
from engines.tensorrt.runtime import TensorRt, TensorRtRtx
from fluxdeploy.bundle.manifest import DimensionRange, EngineRecord
from fluxdeploy.errors import EngineError, FluxDeployError, MissingDependencyError, UsageError
from fluxdeploy.progress import Progress
from tests.engines.conftest import INPUTS, RANGES, record, source

Pretend = Callable[..., None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """`pretend(installed, driver, gpu)`: another machine than this one."""

    def make(
        installed: tuple[str, ...] = ("tensorrt", "tensorrt_rtx"),
        driver: bool = True,
        gpu: str | None = "sm89",
        cuda_python: bool = True,
    ) -> None:
        find = module.importlib.util.find_spec
        known = ("tensorrt", "tensorrt_rtx")
        monkeypatch.setattr(
            module.importlib.util,
            "find_spec",
            lambda name: (name in installed or None) if name in known else find(name),
        )
        monkeypatch.setattr(gpus, "has_nvidia_driver", lambda: driver)
        monkeypatch.setattr(gpus, "has_cuda_python", lambda: cuda_python)
        monkeypatch.setattr(gpus, "compute_capability", lambda device=0: gpu)
        for runtime in (TensorRt, TensorRtRtx):
            monkeypatch.setattr(runtime, "version", lambda self: "1.7.1")

    return make


@pytest.mark.parametrize(
    ("machine", "detail"),
    [
        ({"installed": ()}, r"not installed: pip install .*\[rtx\]'"),
        ({"driver": False}, "installed, but there is no NVIDIA driver"),
        ({"cuda_python": False}, r"cuda-python is not installed: pip install .*\[rtx\]'"),
        ({"gpu": None}, "there is an NVIDIA driver, but no GPU"),
        ({"gpu": "sm90"}, "the GPU is sm90, which TensorRT-RTX does not support"),
        ({"gpu": "sm120"}, "the GPU is sm120$"),
    ],
)
def test_why_it_cannot_run(pretend: Pretend, machine: dict[str, object], detail: str) -> None:
    pretend(**machine)
    runtime = TensorRtRtx()
    available = runtime.availability("sm89")
    assert not available.ok
    assert re.search(detail, available.detail)
    engine = EngineRecord("tensorrt-rtx", "1.7.1", "sm89", "tiny.engine", RANGES)
    with pytest.raises(FluxDeployError, match=detail.rstrip("$")):
        runtime.open("tiny", record(engine), engine, Path("missing"), EngineOptions())


def test_the_gpu_that_is_asked_for_is_the_one_that_counts(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend()
    found = ["sm89", "sm120"]
    monkeypatch.setattr(gpus, "compute_capability", lambda device=0: found[device])
    runtime = TensorRtRtx()
    assert [runtime.availability("sm120", device).ok for device in (0, 1)] == [False, True]
    engine = EngineRecord("tensorrt-rtx", "1.7.1", "sm89", "tiny.engine", RANGES)
    with pytest.raises(EngineError, match="tiny was built for sm89, but the GPU is sm120"):
        runtime.open("tiny", record(engine), engine, Path("missing"), EngineOptions(device=1))


def test_timings_are_kept_by_runtime_version_and_target(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend()
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    kept = Path("/cache/fluxdeploy/tensorrt-1.7.1-sm90.timings")
    assert TensorRt()._timings(("sm90",)) == kept
    assert TensorRtRtx()._timings(("sm89",)) is None, "it measures nothing"


def test_an_engine_of_another_version_is_refused_before_it_is_read(pretend: Pretend) -> None:
    pretend()
    engine = EngineRecord("tensorrt-rtx", "1.6.0", "sm89", "tiny.engine", RANGES)
    with pytest.raises(EngineError, match=r"built with TensorRT-RTX 1\.6\.0, and 1\.7\.1 is"):
        TensorRtRtx().open("tiny", record(engine), engine, Path("missing"), EngineOptions())


def test_building_for_other_gpus_is_for_rtx_alone(pretend: Pretend) -> None:
    pretend(gpu="sm90")
    assert TensorRt().can_build("sm90").ok
    assert not TensorRt().can_build("sm89").ok
    assert TensorRtRtx().can_build("sm89").ok
    assert chosen(choose_builder, "sm90") == ("tensorrt", "sm90")
    assert chosen(choose_builder, "sm89", "sm120", "sm89") == ("tensorrt-rtx", "sm89", "sm120")
    assert chosen(choose_builder, "cuda") == ("onnxruntime", "cuda")
    assert chosen(choose_builder) == ("tensorrt", "sm90")
    pretend(driver=False)
    assert chosen(choose_builder, "sm89") == ("tensorrt-rtx", "sm89")
    with pytest.raises(EngineError, match="tensorrt on sm100: TensorRT builds for the GPU it has"):
        choose_builder(targets=["sm100"])
    with pytest.raises(UsageError, match=r"targets sm99: tensorrt has sm121, .*onnxruntime has"):
        choose_builder(targets=["sm99"])
    with pytest.raises(UsageError, match="has the targets sm89, cpu"):
        choose_builder(targets=["sm89", "cpu"])


def chosen(choose: Callable[..., Any], *targets: str) -> tuple[str, ...]:
    runtime, found = choose(AUTO, targets)
    return (runtime.name, *found)


def test_a_runtime_that_cannot_build_here_is_chosen_where_there_is_no_other(
    pretend: Pretend,
) -> None:
    pretend(driver=False)
    assert chosen(choose_runtime, "sm89") == ("tensorrt-rtx", "sm89")
    assert chosen(choose_runtime, "sm100", "sm100") == ("tensorrt", "sm100")
    with pytest.raises(UsageError, match="sm99"):
        choose_runtime("tensorrt-rtx", ["sm99"])


def test_auto_takes_tensorrt_first_then_rtx(pretend: Pretend) -> None:
    pretend()
    assert [(r.name, t) for r, t in [choose_target()]] == [("tensorrt", "sm89")]
    pretend(installed=("tensorrt_rtx",))
    assert [(r.name, t) for r, t in [choose_target()]] == [("tensorrt-rtx", "sm89")]
    pretend(gpu="sm90", installed=("tensorrt_rtx",))
    assert choose_target()[0].name == "onnxruntime"


def test_reasons_are_given_once_for_all_targets(pretend: Pretend) -> None:
    pretend(driver=False)
    with pytest.raises(EngineError, match=r"tensorrt-rtx on sm121, sm120, .*: installed, but") as e:
        choose_target("tensorrt-rtx")
    assert str(e.value).count("no NVIDIA driver") == 1


def test_where_nothing_runs_the_targets_that_can_be_built_for_are_named(pretend: Pretend) -> None:
    pretend(driver=False)
    for precision, targets in (
        ("fp8", "in fp8 for sm121, sm120, sm89"),
        ("int8", "in int8 for sm121, sm120, sm89, sm86, sm80, sm75"),
        (None, "for sm121, sm120, sm89, sm86, sm80, sm75"),
    ):
        words = f"name its --target: tensorrt-rtx builds {targets}"
        with pytest.raises(EngineError, match=rf"{words}\.$"):
            choose_target("tensorrt-rtx", precision)
    # TensorRT builds for the GPU it has, so that no target would help.
    with pytest.raises(EngineError, match=r"no NVIDIA driver\.$"):
        choose_target("tensorrt", "fp8")


def test_types_around_quantized_layers() -> None:
    runtime = TensorRtRtx()
    assert runtime.compute("sm89", "fp8") == "bf16"
    assert runtime.compute("sm75", "int8") == "fp16"
    assert [runtime.compute("sm80", p) for p in ("fp32", "bf16", "fp16")] == [
        "fp32",
        "bf16",
        "fp16",
    ]
    assert runtime.precision("sm80", "int8") == "int8"
    assert "no FP8" in (runtime.precision_problem("sm80", "fp8") or "")


@pytest.mark.parametrize(
    ("targets", "precision", "profiles", "words"),
    [
        (("sm90",), "bf16", (RANGES,), "tensorrt-rtx has no target 'sm90'; its targets are sm121"),
        ((), "bf16", (RANGES,), "tensorrt-rtx needs a target"),
        (("sm89", "sm80"), "fp8", (RANGES,), r"tiny cannot be fp8: sm80 \(Ampere\)"),
        (("sm89",), "bf16", (), "at least one resolution bucket"),
        (("sm89",), "bf16", ({"B": DimensionRange(1, 1, 2)},), "a resolution bucket lacks T"),
        (
            ("sm89",),
            "bf16",
            ({**RANGES, "T": DimensionRange(4, 2, 8)},),
            "dimension T must have 1 <= min <= opt <= max, not 4, 2, 8",
        ),
    ],
)
def test_refused_before_any_work(
    pretend: Pretend,
    tmp_path: Path,
    targets: tuple[str, ...],
    precision: str,
    profiles: tuple[dict[str, DimensionRange], ...],
    words: str,
) -> None:
    pretend(installed=())
    asked = source("tiny", precision, tmp_path / "missing.onnx", INPUTS)
    with pytest.raises(UsageError, match=words):
        TensorRtRtx().build(
            asked, targets, BuildSettings(profiles), tmp_path / "e", Progress(quiet=True)
        )


def test_building_without_the_package(pretend: Pretend, tmp_path: Path) -> None:
    pretend(installed=())
    runtime = TensorRt()
    runtime.module = "tensorrt_that_is_not_there"
    asked = source("tiny", "bf16", tmp_path / "missing.onnx", INPUTS)
    settings = BuildSettings((RANGES,))
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[tensorrt\]'"):
        runtime.build(asked, ("sm89",), settings, tmp_path / "e", Progress(quiet=True))


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libnvinfer.so.10: cannot open shared object file"),
        OSError("libcublas.so.12: cannot open shared object file"),
        FileNotFoundError("Could not find: nvinfer_10.dll. Is it on your PATH?"),
    ],
)
def test_libraries_that_do_not_load(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(name: str) -> Any:
        raise error

    monkeypatch.setattr(module.importlib, "import_module", broken)
    with pytest.raises(MissingDependencyError, match=r"TensorRT cannot be imported \(.*(lib|dll)"):
        TensorRt()._import()
