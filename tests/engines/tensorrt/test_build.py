"""Building engines with TensorRT-RTX, which needs no GPU: refusals, errors, progress, Ctrl-C."""

from __future__ import annotations

import io
import re
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

import tensorrt_rtx as trt

from engines import BuildSettings
from engines.tensorrt.build import _Messages, _Phases, _Timings
from engines.tensorrt.fusion import FusionReport
from engines.tensorrt.runtime import TensorRtRtx
from fluxdeploy.bundle.manifest import DimensionRange, TensorSpec
from fluxdeploy.errors import BundleError, EngineError
from fluxdeploy.progress import Progress, Task
from tests.engines.conftest import source
from tests.engines.tensorrt.block import INPUTS, RANGES, Block, write_block

PLAIN = Block(linears=(), attention=())
SETTINGS = BuildSettings((RANGES,))
Build = Callable[..., Any]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(
        settings: BuildSettings = SETTINGS,
        targets: tuple[str, ...] = ("sm89",),
        progress: Progress | None = None,
        path: Path | None = None,
        inputs: tuple[TensorSpec, ...] = INPUTS,
        precision: str = "bf16",
        destination: Path | None = None,
    ) -> Any:
        asked = source(
            "block",
            precision,
            path or write_block(tmp_path, PLAIN),
            inputs,
            attentions=1,
            weight_bytes=2 << 20,
        )
        to = destination or tmp_path / "block.engine"
        return TensorRtRtx().build(asked, targets, settings, to, progress or Progress(quiet=True))

    return make


def test_a_build_shows_its_progress_and_replaces_the_file(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engine = tmp_path / "block.engine"
    engine.write_bytes(b"an earlier one")
    told = io.StringIO()
    settings = BuildSettings((RANGES,), memory_limit=1 << 30, weight_streaming=True)
    files = build(settings, ("sm80", "sm86"), Progress(stream=told))
    assert files == (engine, tmp_path / "block.kernels.json")
    report = FusionReport.from_json(files[1].read_text())
    assert engine.stat().st_size == report.engine_bytes > 1 << 20
    assert "block: building for sm80+sm86: " in told.getvalue()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "block.engine",
        "block.kernels.json",
        "block.onnx",
    ], "no cache of timings: TensorRT-RTX measures nothing"


class Config:
    """A builder's configuration, which knows the timings of one GPU."""

    def __init__(self) -> None:
        self.given: list[bytes] = []
        self.cache: Any = None

    def create_timing_cache(self, data: bytes) -> Any:
        self.given.append(data)
        broken = data.startswith(b"broken")
        return None if broken else SimpleNamespace(data=data, serialize=lambda: data + b" measured")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        fits = not cache.data.startswith(b"another GPU")
        self.cache = cache if fits else None
        return fits

    def get_timing_cache(self) -> Any:
        return self.cache


@pytest.mark.parametrize(
    ("known", "kept"),
    [
        (None, b" measured"),
        (b"ours", b"ours measured"),
        (b"another GPU's", b" measured"),
        (b"broken", b" measured"),
    ],
)
def test_timings_are_kept_for_the_next_build(
    tmp_path: Path, known: bytes | None, kept: bytes
) -> None:
    path = tmp_path / "cache" / "tensorrt.timings"
    if known is not None:
        path.parent.mkdir()
        path.write_bytes(known)
    timings, config = _Timings(path), Config()
    timings.load(config)
    assert config.given[0] == (known or b"")
    timings.save(config)
    assert path.read_bytes() == kept


def test_timings_that_cannot_be_kept_are_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    timings, config = _Timings(tmp_path / "file" / "tensorrt.timings"), Config()
    timings.load(config)
    timings.save(config)
    assert config.given == [b""]


def test_too_little_memory(build: Build, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"build block \(bf16\) for sm89: .*raise the builder's"):
        build(BuildSettings((RANGES,), memory_limit=1 << 10))
    assert not (tmp_path / "block.engine").exists()


def test_a_type_that_the_target_has_not(build: Build, tmp_path: Path) -> None:
    """The file holds another precision than its record says."""
    path = write_block(tmp_path, Block(attention=(), activations=False))
    with pytest.raises(EngineError, match=r"fp8_e4m3.*choose another precision or target"):
        build(targets=("sm80",), path=path)


def test_a_broken_file(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(
        EngineError, match=r"cannot read .*broken.onnx \(block\): .*Export it again"
    ):
        build(path=path)
    with pytest.raises(EngineError, match=r"cannot read .*missing.onnx"):
        build(path=tmp_path / "missing.onnx")


def test_float32_scales_in_a_bfloat16_graph(build: Build, tmp_path: Path) -> None:
    """As quantizers that know no bfloat16 write them: without casts, the types do not meet."""
    import onnx

    path = write_block(tmp_path, Block(linear_scales="fp32"))
    model = onnx.load(path)
    renamed: dict[str, str] = {}
    for node in list(model.graph.node):
        if node.op_type == "Cast" and node.input[0].endswith("_wide") and "_cast" in node.name:
            renamed[node.output[0]] = node.input[0]
            model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    onnx.save(model, path)
    with pytest.raises(EngineError, match=r"(?i)type|must have the same"):
        build(path=path, precision="fp8")


def test_an_input_that_the_graph_has_not(build: Build) -> None:
    inputs = (*INPUTS, TensorSpec("z", "float32", ("B",)))
    with pytest.raises(EngineError, match=r"block.onnx has no input z; it has x\."):
        build(inputs=inputs)


def test_an_error_keeps_nothing_of_the_library(build: Build, tmp_path: Path) -> None:
    """Collected as garbage, in any order, its objects would end the process."""
    with pytest.raises(EngineError) as raised:
        build(path=tmp_path / "missing.onnx")
    frames = [frame for frame, _ in traceback.walk_tb(raised.tb)]
    assert "_build" in {frame.f_code.co_name for frame in frames}
    held = {type(value).__name__ for frame in frames for value in frame.f_locals.values()}
    assert "_Job" in held
    assert held.isdisjoint({"Builder", "INetworkDefinition", "OnnxParser", "IBuilderConfig"})


def test_a_bucket_that_the_graph_cannot_have(build: Build) -> None:
    inputs = (TensorSpec("x", "float32", ("B", "L", "H")),)
    sizes = RANGES | {"H": DimensionRange(1, 2, 3)}
    with pytest.raises(EngineError):
        build(BuildSettings((sizes,)), inputs=inputs)


class Refusing:
    """The library, with parts that say no as its bindings do: with an exception of Python's."""

    def __init__(self, part: str, error: Exception, says: str) -> None:
        self.part, self.error, self.says = part, error, says

    def __getattr__(self, name: str) -> Any:
        return self._refuse if name == self.part else getattr(trt, name)

    def _refuse(self, *arguments: Any) -> Any:
        arguments[-1].log(trt.ILogger.ERROR, self.says)
        raise self.error


@pytest.mark.parametrize(
    ("part", "says", "words"),
    [
        ("Builder", "CUDA initialization failure with error: 35", "failure with error: 35. Look"),
        ("Builder", "x::catchCudaError::250] CUDA error 100", "CUDA error 100. Look at the NVIDIA"),
        ("OnnxParser", "out of memory", "makes no builder for block: out of memory"),
    ],
)
def test_a_library_that_does_not_start(
    build: Build, monkeypatch: pytest.MonkeyPatch, part: str, says: str, words: str
) -> None:
    error = TypeError("pybind11::init(): factory function returned nullptr")
    monkeypatch.setattr(TensorRtRtx, "_import", lambda self: Refusing(part, error, says))
    with pytest.raises(EngineError, match=re.escape(words)):
        build()


def test_a_size_that_the_binding_refuses(build: Build) -> None:
    """An axis of -1 passes the check of ranges: the shape is the manifest's."""
    inputs = (TensorSpec("x", "float32", ("B", "L", -2)),)
    with pytest.raises(EngineError, match=r"block: TensorRT refuses a resolution bucket: .*\w"):
        build(inputs=inputs)


def test_a_folder_that_is_not_there(build: Build, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"Cannot write .*there is no such file or folder"):
        build(destination=tmp_path / "missing" / "block.engine")


def test_ctrl_c_stops_a_build(build: Build, tmp_path: Path) -> None:
    class Interrupted(Progress):
        """Ctrl-C once the builder has begun: it reaches the main thread where it waits."""

        def task(self, description: str, total: float | None = None) -> Task:
            made = super().task(description, total)
            advance = made.advance

            def interrupt(n: float = 1) -> None:
                if not hit.is_set():
                    hit.set()
                    signal.pthread_kill(main, signal.SIGINT)
                advance(n)

            made.advance = interrupt  # type: ignore[method-assign]
            return made

    hit, main = threading.Event(), threading.get_ident()
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("Ctrl-C reaches the main thread alone")
    # Workers of a parallel test run ignore the signal.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build(progress=Interrupted(quiet=True))
    finally:
        signal.signal(signal.SIGINT, usual)
    assert hit.is_set()
    assert not (tmp_path / "block.engine").exists()


def test_nested_phases_are_one_bar() -> None:
    with Progress(quiet=True) as progress:
        task = progress.task("x", total=1.0)
        stop = threading.Event()
        phases = _Phases(task, stop)
        phases.start("all", None, 4)
        assert phases.step("all", 0)
        assert task.done == pytest.approx(0.25)
        phases.start("part", "all", 2)
        phases.start("piece", "part", 5)
        phases.step("piece", 3)
        assert task.done == pytest.approx(0.25 + 0.25 * 0.5 * 0.8)
        phases.finish("piece")
        phases.start("piece", "part", 5)
        phases.step("piece", 0)
        assert task.done == pytest.approx(0.35), "it never goes back"
        phases.finish("piece")
        phases.finish("part")
        stop.set()
        assert not phases.step("all", 3)
        assert task.done == pytest.approx(0.99)


def test_a_missing_driver_is_not_the_reason() -> None:
    messages = _Messages(trt)
    logger = messages.logger
    for text in (
        "[builder.cpp::x::1] Error Code 4: the cause",
        "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35)",
    ):
        logger.log(trt.ILogger.ERROR, text)
    logger.log(trt.ILogger.VERBOSE, "Layers:\nName: a\nName: b")
    logger.log(trt.ILogger.VERBOSE, "Parsing node: a")
    assert messages.reason() == "[builder.cpp::x::1] Error Code 4: the cause"
    assert messages.lines() == ["Layers:", "Name: a", "Name: b"]
