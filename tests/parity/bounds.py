"""How far float32 may be from the exact value: as far as another float32 implementation is.

A bound that is a number has to be read off some machine, and sums are taken in another order on
the next. What float32 costs is measured in place: by diffusers, against itself in float64.
"""

from __future__ import annotations

import numpy as np

__all__ = ["PICTURE", "PROMISE", "assert_as_exact"]

PROMISE = 1 / 255
"""Largest difference of a pixel in 0..1 from diffusers that the project promises."""

PICTURE = 0.01 / 255
"""The `floor` of pictures in 0..1."""

_FACTOR = 4
"""Two float32 implementations of one formula were up to 2 times apart in their errors past the
floor, over 56 pictures, 3 instruction sets, 2 numbers of threads and 5 roundings of each noise."""


def assert_as_exact(ours: np.ndarray, float32: np.ndarray, exact: np.ndarray, floor: float) -> None:
    """`ours` is about as near to `exact` as `float32` is, at its worst and in the mean square.

    `float32` and `exact` are one computation in float32 and in float64. `floor` is what the worst
    value may be off where `float32` happens to be exact; the mean square may be a tenth of it.
    """
    assert ours.shape == float32.shape == exact.shape
    assert exact.dtype == np.float64
    own, cost = np.abs(ours - exact), np.abs(float32 - exact)
    for name, measure, least in (("at worst", np.max, floor), ("rms", _rms, floor / 10)):
        found, bound = measure(own), _FACTOR * measure(cost) + least
        assert found <= bound, (
            f"off by {found:.3g} {name} ({found * 255:.3g}/255), where float32 costs "
            f"{measure(cost):.3g} and {bound:.3g} is allowed"
        )


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
