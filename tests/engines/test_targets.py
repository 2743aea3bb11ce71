"""Which precision each GPU target can have."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import BuildSettings
from engines.targets import GENERATIONS
from engines.tensorrt.runtime import TensorRt
from fluxdeploy.errors import UsageError
from fluxdeploy.progress import Progress
from tests.engines.conftest import INPUTS, RANGES, source

FP8 = ("fp8", "fp8-linears", "fp8-weights")
INT8 = ("int8", "int8-weights", "int8-dynamic")
PRECISIONS = (*FP8, *INT8, "int4-weights", "fp4", "fp32", "bf16", "fp16")


@pytest.mark.parametrize("target", GENERATIONS)
def test_what_the_hardware_has(target: str) -> None:
    possible = {p for p in PRECISIONS if TensorRt().precision_problem(target, p) is None}
    number = int(target[2:])
    assert {"fp16", "int8", "int8-weights"} <= possible
    assert ("bf16" in possible) == (number >= 80)
    assert ("int4-weights" in possible) == (number >= 80)
    assert ("fp32" in possible) == (number >= 80)
    assert possible.intersection(FP8) == (set(FP8) if number >= 89 else set())
    assert ("fp4" in possible) == (target in ("sm120", "sm121"))
    assert "int8-dynamic" not in possible


@pytest.mark.parametrize(
    ("precision", "targets", "words"),
    [
        ("fp8", ("sm89", "sm86"), r"sm86 \(Ampere\) has no FP8.*use int8 or bf16"),
        ("fp8-weights", ("sm75",), r"sm75 \(Turing\) has no FP8.*use fp16 or int8"),
        ("fp4", ("sm89",), r"sm89 \(Ada\) has no FP4 here, which is for sm120, sm121; use fp8"),
        ("int4-weights", ("sm75",), r"sm75 \(Turing\) has no INT4 here, .*; use int8-weights"),
        ("bf16", ("sm75",), "has no bfloat16, which starts with sm80; use fp16"),
        ("int8-dynamic", ("sm80",), "int8-dynamic is for ONNX Runtime on CPUs; use int8"),
    ],
)
def test_refusals_say_what_to_use(precision: str, targets: tuple[str, ...], words: str) -> None:
    asked = source("transformer", precision, Path("missing.onnx"), INPUTS)
    settings = BuildSettings((RANGES,))
    with pytest.raises(UsageError, match=f"^transformer cannot be {precision}: .*{words}"):
        TensorRt().build(asked, targets, settings, Path("missing"), Progress(quiet=True))
