"""What is done with the engines of a component, on a runtime that only pretends to build."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")

from engines import Availability, BuildReport, BuildSettings
from engines.tensorrt.fusion import FusionReport
from engines.tensorrt.runtime import TensorRtRtx
from fluxdeploy.build.engines import build_engines, check_engine, list_engines
from fluxdeploy.errors import EngineError
from fluxdeploy.progress import Progress
from tests.engines.conftest import RANGES, record

QUIET = Progress(quiet=True)
TARGETS = ("sm89", "sm120")


class PretendedRuntime(TensorRtRtx):
    """Writes an engine of one linear, of the type `linear`."""

    def __init__(self, linear: str = "bf16") -> None:
        super().__init__()
        self.linear = linear
        self.built: list[tuple[str, ...]] = []

    def availability(self, target: str) -> Availability:
        return Availability(False, "there is no GPU")

    def build(
        self,
        source: Any,
        targets: Sequence[str],
        settings: BuildSettings,
        destination: Path,
        progress: Progress,
    ) -> BuildReport:
        self.built.append(tuple(targets))
        destination.write_bytes(b"engine")
        fusion = FusionReport((), {"linear": self.linear}, {}, (), (), 0, 6)
        return BuildReport(6, 0.0, fusion)


class Exported:
    path, quantized, attentions, weight_bytes = "tiny.onnx", 1, 0, 0


def build(runtime: PretendedRuntime, root: Path) -> list[str]:
    made = list_engines(runtime, TARGETS, "tiny", RANGES)
    component = replace(record(*made), precision="fp8", compute="bf16")
    exported: Any = Exported()
    return build_engines(runtime, "tiny", component, exported, BuildSettings(()), root, QUIET)


def test_each_target_has_an_engine_and_a_report_of_its_own(tmp_path: Path) -> None:
    runtime = PretendedRuntime("fp8")
    paths = build(runtime, tmp_path)
    assert runtime.built == [("sm89",), ("sm120",)]
    assert paths == [
        f"engines/tensorrt-rtx/{target}/tiny.{suffix}"
        for target in TARGETS
        for suffix in ("engine", "kernels.json")
    ]
    assert all((tmp_path / path).is_file() for path in paths)


def test_an_engine_of_other_kernels_is_refused_with_the_place_of_their_list(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"tiny engine for sm89 is not the fp8 engine .*kernels"):
        build(PretendedRuntime("bf16"), tmp_path)


def test_an_engine_that_cannot_run_here_is_not_checked_and_that_is_told(tmp_path: Path) -> None:
    runtime = PretendedRuntime()
    said = io.StringIO()
    component = record(*list_engines(runtime, TARGETS, "tiny", RANGES))
    check_engine(runtime, "tiny", component, tmp_path, Progress(stream=said))
    assert said.getvalue().strip() == "tiny: not checked, since there is no GPU"
