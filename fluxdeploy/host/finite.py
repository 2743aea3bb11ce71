"""Whether numbers are finite: a picture of NaN is never made."""

from __future__ import annotations

import numpy as np

from engines.base import Array
from fluxdeploy.errors import NumericError

__all__ = ["check_finite", "is_finite"]


def check_finite(
    values: Array, component: str, step: int | None = None, steps: int | None = None
) -> None:
    """Raise `NumericError`, naming the component and the step, where a value is NaN or infinite."""
    if is_finite(values):
        return
    where = "" if step is None else f" at step {step + 1} of {steps}"
    raise NumericError(
        f"The {component} gave NaN or infinity{where}. Use a bundle in a wider precision (bf16 or "
        "fp32), or run `fluxdeploy verify` to see which component is off."
    )


def is_finite(values: Array) -> bool:
    """Whether all values are finite, without allocating.

    The extremes tell: both carry NaN along, and, unlike a sum, neither overflows.
    """
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(values.min()) and np.isfinite(values.max()))
