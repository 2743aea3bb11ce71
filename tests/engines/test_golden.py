"""The numeric gate: how far an engine is from the golden tensors, and what passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engines.golden import Deviation
from fluxdeploy.bundle.manifest import GoldenRecord


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
