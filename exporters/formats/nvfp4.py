"""NVFP4 weights: E2M1 numbers, an E4M3 scale for every 16 of them, a float32 scale for all.

E2M1 has a sign, two bits of exponent and one of fraction: 0, 0.5, 1, 1.5, 2, 3, 4 and 6, which are
codes 0 to 7, with 8 added for the sign (OCP Microscaling Formats, 5.3.3).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluxdeploy.errors import CheckpointError

__all__ = ["BLOCK", "LARGEST_PRODUCT", "pack_fp4"]

BLOCK = 16
"""Numbers that share a scale."""

_LARGEST_E2M1, _LARGEST_E4M3, _LEAST_E4M3 = 6.0, 448.0, 2.0**-9
LARGEST_PRODUCT = _LARGEST_E2M1 * _LARGEST_E4M3
"""The largest number with the largest block scale."""


def pack_fp4(
    parts: Iterable[NDArray[np.float32]], shape: tuple[int, int], name: str, largest: float
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """A linear's weight [out, in] in 4 bits, transposed, as raw bytes.

    `parts` are the weight's rows in order, an even number at a time; they are overwritten. Returns
    two codes a byte [in, out / 2], the first in the low bits; E4M3 block scales [in / 16, out]; and
    the float32 scale for all of them, 4 bytes. weight ≈ (codes · block scales · scale)ᵀ. A block's
    scale maps its largest number to the largest of E2M1 and is rounded to E4M3 before the numbers
    are. The scale for all maps the `largest` magnitude of the whole weight, or of several that
    share it, to the largest of both types. `in` is a multiple of 16, `out` is even. Raises
    `CheckpointError` where the weight is not finite.
    """
    rows, columns = shape
    scale = (torch.tensor(largest) / LARGEST_PRODUCT).clamp(min=torch.finfo(torch.float32).tiny)
    codes = np.empty((columns, rows // 2), np.uint8)
    scales = np.empty((columns // BLOCK, rows), np.uint8)
    end = 0
    for part in parts:
        values = torch.from_numpy(part)
        start, end = end, end + len(part)
        blocks = values.view(len(part), -1, BLOCK)
        peaks = torch.maximum(blocks.amax(2), -blocks.amin(2))
        if not torch.isfinite(peaks).all():
            raise CheckpointError(
                f"Tensor {name} holds NaN or infinity: the checkpoint is damaged."
            )
        # A block scale of 0 would divide by it, and engines refuse it.
        steps = (peaks / _LARGEST_E2M1 / scale).clamp(_LEAST_E4M3, _LARGEST_E4M3)
        narrow = steps.to(torch.float8_e4m3fn)
        blocks /= (narrow.float() * scale)[:, :, None]
        torch.from_numpy(scales)[:, start:end] = narrow.view(torch.uint8).t()
        rounded = _round(values)
        pairs = rounded[::2] | rounded[1::2] << 4
        # Transposed on its own first, which torch does in blocks that fit the cache.
        torch.from_numpy(codes)[:, start // 2 : end // 2] = pairs.t().contiguous()
    return codes, scales, scale.reshape(1).view(torch.uint8).numpy()


def _round(values: Tensor) -> Tensor:
    """Codes of float32 numbers, rounded to the nearest, of two the even one.

    Codes 0 to 4 are 0.5 apart, 4 to 6 are 1, 6 and 7 are 2. In each of these parts its own line is
    the lowest of the three.
    """
    size = values.abs()
    codes = (2 * size).round_()
    torch.minimum(codes, size.round().add_(2), out=codes)
    torch.minimum(codes, (size / 2).round_().add_(4), out=codes)
    return codes.clamp_(max=7).to(torch.uint8) | values.signbit().to(torch.uint8) << 3
