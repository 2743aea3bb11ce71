"""How alike two pictures are: the peak signal-to-noise ratio and the structural similarity."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["psnr", "ssim"]

Array = NDArray[Any]
Doubles = NDArray[np.float64]

_TAPS, _SIGMA = 11, 1.5
_OFFSETS = np.arange(_TAPS) - _TAPS // 2
_WINDOW = np.exp(-(_OFFSETS**2) / (2 * _SIGMA**2))
_WINDOW /= _WINDOW.sum()

# (K1 * peak)^2 and (K2 * peak)^2 with the paper's K1 = 0.01 and K2 = 0.03, and a peak of 1.
_C1, _C2 = 0.01**2, 0.03**2


def psnr(a: Array, b: Array) -> float:
    """10 log10(1 / mean squared difference), in dB, of pictures [H, W, 3] in 0..1.

    Infinite where they are equal. Raises `ValueError` where they do not have one such shape.
    """
    x, y = _pair(a, b)
    error = float(np.square(x - y).mean())
    return -10 * float(np.log10(error)) if error else float("inf")


def ssim(a: Array, b: Array) -> float:
    """Structural similarity of pictures [H, W, 3] in 0..1: 1 where they are equal, -1 at least.

    Z. Wang, A. C. Bovik, H. R. Sheikh and E. P. Simoncelli, "Image Quality Assessment: From Error
    Visibility to Structural Similarity", IEEE Transactions on Image Processing 13(4), 2004, with
    the paper's Gaussian window of 11x11 pixels and 1.5 pixels standard deviation, wherever it lies
    whole in the picture. Of the three channels the mean. Raises `ValueError` for another shape, and
    for pictures smaller than the window.
    """
    x, y = _pair(a, b)
    if min(x.shape[:2]) < _TAPS:
        raise ValueError(
            f"SSIM looks at {_TAPS}x{_TAPS} pixels; a picture of {x.shape[1]}x{x.shape[0]} has "
            "not as many."
        )
    mean_x, mean_y = _average(x), _average(y)
    product = mean_x * mean_y
    squares = mean_x**2 + mean_y**2
    covariance = _average(x * y) - product
    variances = _average(x**2 + y**2) - squares
    similarity = (2 * product + _C1) * (2 * covariance + _C2)
    similarity /= (squares + _C1) * (variances + _C2)
    return float(similarity.mean())


def _pair(a: Array, b: Array) -> tuple[Doubles, Doubles]:
    if a.shape != b.shape or a.ndim != 3 or a.shape[2] != 3:
        raise ValueError(
            f"Two pictures [H, W, 3] of one size are needed, not {list(a.shape)} and "
            f"{list(b.shape)}."
        )
    return a.astype(np.float64), b.astype(np.float64)


def _average(x: Doubles) -> Doubles:
    """Weighted means [H - 10, W - 10, C] over the window's places in x [H, W, C]."""
    for axis in (0, 1):
        places = np.lib.stride_tricks.sliding_window_view(x, _TAPS, axis)
        x = places @ _WINDOW
    return x
