"""What is done with the engines of a component, on a runtime that only pretends to build."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from engines import Availability, BuildSettings, EngineSource
from engines.onnxruntime import OnnxRuntime
from engines.tensorrt import build as module
from engines.tensorrt.fusion import FusionReport
from engines.tensorrt.runtime import TensorRtRtx
from exporters.components.registry import COMPONENTS
from fluxdeploy.build import engines
from fluxdeploy.build.engines import build_engines, check_engine, engine_source
from fluxdeploy.build.resolve import list_engines
from fluxdeploy.bundle.manifest import GoldenRecord
from fluxdeploy.errors import EngineError
from fluxdeploy.machine import Memory
from fluxdeploy.progress import Progress
from tests.engines.conftest import INPUTS, RANGES, record

QUIET = Progress(quiet=True)
TARGETS = ("sm89", "sm120")


class PretendedRuntime(TensorRtRtx):
    """It is installed, and there is no GPU."""

    def availability(self, target: str, device: int = 0) -> Availability:
        return Availability(False, "there is no GPU")

    def can_build(self, target: str) -> Availability:
        return Availability(True, "it only pretends to")

    def _import(self) -> Any:
        return None


class Exported:
    path, quantized, attentions, weight_bytes = "tiny.onnx", 1, 0, 0
    weights_only, wide_attentions = 0, 0


class Builder:
    """Writes an engine of one linear, of the type `linear`; `built` is what it was asked for."""

    linear = "fp8"

    def __init__(self) -> None:
        self.built: list[tuple[str, ...]] = []
        self.sources: list[EngineSource] = []

    def build(
        self,
        trt: Any,
        source: EngineSource,
        targets: Sequence[str],
        settings: BuildSettings,
        timings: Path | None,
        destination: Path,
        progress: Progress,
    ) -> FusionReport:
        self.built.append(tuple(targets))
        self.sources.append(source)
        destination.write_bytes(b"engine")
        return FusionReport((), {"linear": self.linear}, {}, (), (), 0, 6)


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    made = Builder()
    monkeypatch.setattr(module, "build_engine", made.build)
    return made


def build(root: Path, component: str = "tiny") -> list[str]:
    runtime = PretendedRuntime()
    declared = COMPONENTS.get(component, COMPONENTS["transformer"])
    spec = SimpleNamespace(
        name=component,
        precision="fp8",
        compute="bf16",
        chain=SimpleNamespace(inputs=INPUTS),
        component=declared,
    )
    source = engine_source(spec, Exported(), root)  # type: ignore[arg-type]
    engines = list_engines(runtime, TARGETS, component, RANGES)
    return build_engines(runtime, source, engines, BuildSettings((RANGES,)), root, QUIET)


def test_each_target_has_an_engine_and_a_report_of_its_own(
    builder: Builder, tmp_path: Path
) -> None:
    paths = build(tmp_path)
    assert builder.built == [("sm89",), ("sm120",)]
    assert paths == [
        f"engines/tensorrt-rtx/{target}/tiny.{suffix}"
        for target in TARGETS
        for suffix in ("engine", "kernels.json")
    ]
    assert all((tmp_path / path).is_file() for path in paths)


def test_an_engine_of_other_kernels_is_refused_with_the_place_of_their_list(
    builder: Builder, tmp_path: Path
) -> None:
    builder.linear = "bf16"
    with pytest.raises(
        EngineError, match=r"tiny engine for sm89 is not the fp8 engine .*kernels"
    ) as raised:
        build(tmp_path)
    listed = tmp_path / "engines" / "tensorrt-rtx" / "sm89" / "tiny.kernels.json"
    assert str(raised.value).endswith(f"Its kernels are listed in {listed}.")
    assert FusionReport.from_json(listed.read_text()).gemms == {"bf16": 1}


@pytest.mark.parametrize(("component", "one_head"), [("transformer", False), ("vae_decoder", True)])
def test_the_attention_of_a_vae_need_not_be_fused(
    builder: Builder, tmp_path: Path, component: str, one_head: bool
) -> None:
    build(tmp_path, component)
    assert [source.one_head for source in builder.sources] == [one_head] * 2


def test_an_engine_that_cannot_run_here_is_not_checked_and_that_is_told(tmp_path: Path) -> None:
    runtime = PretendedRuntime()
    said = io.StringIO()
    component = record(*list_engines(runtime, TARGETS, "tiny", RANGES))
    check_engine(runtime, "tiny", component, tmp_path, Progress(stream=said))
    assert said.getvalue().strip() == "tiny: not checked, since there is no GPU"


class Opened(Exception):
    """The engine was going to be run."""


class Unopened(OnnxRuntime):
    def __init__(self, target: str) -> None:
        self.targets = (target,)

    def availability(self, target: str, device: int = 0) -> Availability:
        return Availability(True, "")

    def open(self, *arguments: Any) -> Any:
        raise Opened


@pytest.mark.parametrize(
    ("target", "free", "checked"),
    [
        ("cpu", 4.4, False),
        ("cpu", 5.1, True),
        ("cpu", None, True),
        ("cuda", 0.1, True),
    ],
)
def test_an_engine_that_memory_is_too_small_for_is_not_checked_and_that_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    free: float | None,
    checked: bool,
) -> None:
    """A session takes 2.5 times its float32 weights, of 2 GiB here; a GPU has memory of its own."""
    monkeypatch.setattr(engines, "weight_bytes", lambda folder, name: 2 << 30)
    available = None if free is None else int(free * 2**30)
    monkeypatch.setattr(engines, "read_memory", lambda: Memory(None, available, None))
    runtime, said = Unopened(target), io.StringIO()
    made = list_engines(runtime, runtime.targets, "tiny", RANGES)
    component = replace(record(*made), golden=GoldenRecord("golden/tiny.safetensors", 1, 0))
    if checked:
        with pytest.raises(Opened):
            check_engine(runtime, "tiny", component, tmp_path, Progress(stream=said))
        return
    check_engine(runtime, "tiny", component, tmp_path, Progress(stream=said))
    assert said.getvalue().strip() == (
        "tiny: not checked, since its engine needs about 5 GiB of memory and 4 GiB are free; run "
        "`fluxdeploy verify` where it fits"
    )
