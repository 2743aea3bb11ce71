"""The numeric gate: how far an engine is from the golden tensors, and what passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engines import Array, EngineOptions
from engines.golden import Deviation, measure_component, require
from fluxdeploy.bundle.manifest import GoldenRecord
from fluxdeploy.bundle.tensorfile import TensorFileWriter
from fluxdeploy.errors import BundleError, NumericError
from tests.engines.conftest import arrays, engine_record, expected, record
from tests.engines.opening_runtime import TinyEngine


def test_a_deviation_is_relative_to_the_largest_reference() -> None:
    reference = np.array([0, -4, 2], np.float32)
    deviation = Deviation.of(reference + np.float32(0.4), reference)
    assert deviation.max_error == pytest.approx(0.1)
    assert deviation.psnr == pytest.approx(20)
    golden = GoldenRecord("x", 0.11, 0.9)
    assert deviation.within(golden)
    assert not deviation.within(replace(golden, max_error=0.09))
    assert not deviation.within(replace(golden, min_cosine=0.9999))


def test_a_value_that_is_not_finite_is_past_every_gate() -> None:
    reference = np.ones(3, np.float32)
    deviation = Deviation.of(np.array([1, np.nan, 1], np.float32), reference)
    assert not deviation.within(GoldenRecord("x", 1e30, -0.9))


def test_a_cosine_is_never_past_one() -> None:
    for seed in range(50):
        x = np.random.RandomState(seed).standard_normal(100).astype(np.float32)
        assert 1 - 1e-12 < Deviation.of(x, x).cosine <= 1


def golden(folder: Path, **outputs: NDArray[np.float32]) -> Path:
    """A golden file of the tiny component, with these outputs."""
    tensors = {f"input.{name}": array for name, array in arrays().items()}
    tensors |= {f"output.{name}": array for name, array in outputs.items()}
    kinds = {"float32": "F32", "int32": "I32"}
    declared = [(name, kinds[str(a.dtype)], a.shape) for name, a in tensors.items()]
    with TensorFileWriter(folder / "tiny.safetensors", declared) as writer:
        for array in tensors.values():
            writer.write(array)
    return folder / "tiny.safetensors"


class Tiny(TinyEngine):
    """The tiny component, with a second output that is its first one's half."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        y = expected(**inputs)
        return {"y": y, "half": y / 2}


@pytest.fixture
def tiny() -> Tiny:
    engine = engine_record()
    return Tiny("tiny", record(engine), engine, EngineOptions())


def test_of_several_outputs_the_worst_counts(tiny: Tiny, tmp_path: Path) -> None:
    y = expected(**arrays())
    off, turned = y + np.float32(0.1) * np.abs(y).max(), -y / 2
    deviation = measure_component(tiny, golden(tmp_path, y=off, half=y / 2))
    assert deviation.max_error == pytest.approx(0.1, rel=0.2)
    deviation = measure_component(tiny, golden(tmp_path, y=y, half=turned))
    assert deviation.cosine == pytest.approx(-1)
    assert measure_component(tiny, golden(tmp_path, y=y, half=y / 2)) == Deviation(0, 1, np.inf)


def test_a_golden_file_that_is_not_the_component_s(tiny: Tiny, tmp_path: Path) -> None:
    y = expected(**arrays())
    with pytest.raises(BundleError, match="holds other outputs than tiny has"):
        measure_component(tiny, golden(tmp_path, y=y))
    with pytest.raises(BundleError, match="holds half in another shape"):
        measure_component(tiny, golden(tmp_path, y=y, half=y[:1]))


@pytest.mark.parametrize(("max_error", "min_cosine"), [(0.09, 0.9), (0.11, 0.95)])
def test_past_its_gate_a_component_is_refused(max_error: float, min_cosine: float) -> None:
    deviation = Deviation(0.1, 0.94, 20.0)
    require("tiny", deviation, GoldenRecord("x", 0.11, 0.93))
    with pytest.raises(NumericError, match=r"tiny is off PyTorch by 0\.1 .*cosine 0\.940000"):
        require("tiny", deviation, GoldenRecord("x", max_error, min_cosine))
