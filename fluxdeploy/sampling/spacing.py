"""How noise levels are spread between the first and the last, after shifting.

As diffusers' schedulers do with `use_karras_sigmas`, `use_exponential_sigmas` and
`use_beta_sigmas`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["spaced"]

_RHO = 7.0
_ALPHA = 0.6
"""Both parameters of the beta distribution (arXiv 2407.12173)."""

_TERMS = 80
"""Of its series, which has halves to the power of their number."""


def spaced(spacing: str, levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """As many levels, float32 [N], from the first to the last of these.

    spacing: "karras", equation 5 of arXiv 2206.00364 with rho 7; "exponential", even steps of the
    logarithm; "beta", the quantiles of the beta distribution.
    """
    first, last, count = float(levels[0]), float(levels[-1]), len(levels)
    shares = np.linspace(0, 1, count)
    if spacing == "karras":
        high, low = first ** (1 / _RHO), last ** (1 / _RHO)
        found = (high + shares * (low - high)) ** _RHO
    elif spacing == "exponential":
        found = np.exp(np.linspace(math.log(first), math.log(last), count))
    else:
        found = last + _beta_quantiles(1 - shares) * (first - last)
    spread: NDArray[np.float32] = found.astype(np.float32)
    return spread


def _beta_quantiles(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the beta distribution with parameters 0.6 and 0.6 reaches each share."""
    # Symmetric about a half: the lower half has the series that converges.
    below = np.minimum(shares, 1 - shares)
    whole = math.gamma(_ALPHA) ** 2 / math.gamma(2 * _ALPHA)
    # In y = x^0.6, from which the integral is almost a line.
    low, high = np.zeros_like(below), np.full_like(below, 0.5**_ALPHA)
    for _ in range(64):
        middle = (low + high) / 2
        less = middle * _series(middle ** (1 / _ALPHA)) < below * whole
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    # The ends are exact.
    found = np.where(below == 0, 0.0, ((low + high) / 2) ** (1 / _ALPHA))
    return np.where(shares <= 0.5, found, 1 - found)


def _series(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The integral of t^-0.4 (1 - t)^-0.4 from 0 to x, divided by x^0.6."""
    total, factor = np.full_like(x, 1 / _ALPHA), np.ones_like(x)
    for n in range(1, _TERMS):
        factor = factor * x * (n - _ALPHA) / n
        total = total + factor / (_ALPHA + n)
    return total
