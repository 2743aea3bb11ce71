"""The gates: every precision has one, and a component, a picture or a layer past it fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engines.golden import (
    Deviation,
    is_emulated,
    objects_kept,
)
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, GoldenRecord

ENGINE = EngineRecord("onnxruntime", "1.31.1", "cpu", "onnx/transformer.onnx", {})
RECORD = ComponentRecord("", "fp8", "fp32", (), (), (), (ENGINE,), None)


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


@pytest.mark.parametrize("precision", ["fp8", "fp8-linears", "fp8-weights"])
def test_fp8_is_emulated_on_a_cpu_alone(precision: str) -> None:
    record = replace(RECORD, precision=precision)
    assert is_emulated(record, ENGINE)
    assert not is_emulated(record, replace(ENGINE, runtime="tensorrt", target="sm89"))


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic"])
def test_what_a_cpu_computes_in_is_not_emulated(precision: str) -> None:
    assert not is_emulated(replace(RECORD, precision=precision), ENGINE)


@pytest.mark.parametrize(
    ("right", "expected", "pictures", "kept"),
    [
        (18, 20, 20, True),
        (17, 20, 20, False),
        (0, 19, 19, True),
        (41, 46, 50, True),
        (40, 46, 50, False),
        (50, 10, 50, True),
        *[(count * 7 // 10, count * 8 // 10, count, True) for count in (20, 30, 70, 300)],
    ],
)
def test_a_tenth_of_many_pictures_may_lose_their_objects(
    right: int, expected: int, pictures: int, kept: bool
) -> None:
    assert objects_kept(right / pictures, expected / pictures, pictures) is kept
