"""NVFP4 weights: E2M1 numbers, an E4M3 scale for every 16 of them, a float32 scale for all.

E2M1 has a sign, two bits of exponent and one of fraction: 0, 0.5, 1, 1.5, 2, 3, 4 and 6, which are
codes 0 to 7, with 8 added for the sign (OCP Microscaling Formats, 5.3.3).
"""

from __future__ import annotations

from typing import Any

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

_CHUNK = 1 << 22
"""Numbers that are rounded at a time: what that takes beside them is about 16 bytes each."""


def pack_fp4(
    weight: NDArray[np.float32], name: str, largest: float | None = None
) -> tuple[NDArray[Any], ...]:
    """A linear's weight [out, in] in 4 bits, transposed, as raw bytes.

    Returns two codes a byte [in, out / 2], the first in the low bits; E4M3 block scales
    [in / 16, out]; and the float32 scale for all of them, 4 bytes. weight ≈ (codes · block scales ·
    scale)ᵀ. A block's scale maps its largest number to the largest of E2M1 and is rounded to E4M3
    before the numbers are. The scale for all maps the `largest` of the whole weight, or of several
    that share it, to the largest of both types. `in` is a multiple of 16, `out` is even. `weight`
    is overwritten. Raises `CheckpointError` where it is not finite.
    """
    values = torch.from_numpy(weight)
    rows, columns = values.shape
    blocks = values.view(rows, columns // BLOCK, BLOCK)
    peaks = torch.maximum(blocks.amax(2), -blocks.amin(2))
    if not torch.isfinite(peaks).all():
        raise CheckpointError(f"Tensor {name} holds NaN or infinity: the checkpoint is damaged.")
    whole = peaks.max() if largest is None else torch.tensor(largest)
    scale = (whole / LARGEST_PRODUCT).clamp(min=torch.finfo(torch.float32).tiny)
    # A block scale of 0 would divide by it, and engines refuse it.
    steps = (peaks / _LARGEST_E2M1 / scale).clamp(_LEAST_E4M3, _LARGEST_E4M3)
    narrow = steps.to(torch.float8_e4m3fn)
    blocks /= (narrow.float() * scale)[:, :, None]
    packed = torch.empty((columns, rows // 2), dtype=torch.uint8)
    some = max(_CHUNK // columns // 2 * 2, 2)
    for start in range(0, rows, some):
        codes = _round(values[start : start + some]).t()
        end = start + codes.shape[1]
        packed[:, start // 2 : end // 2] = codes[:, ::2] | codes[:, 1::2] << 4
    scales = narrow.t().contiguous().view(torch.uint8)
    return packed.numpy(), scales.numpy(), scale.float().reshape(1).view(torch.uint8).numpy()


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
