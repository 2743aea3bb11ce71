"""Quantized weights: one scale for each row of a linear, and the rows as 8-bit numbers.

Those of 4 bits are in `exporters.formats.nvfp4`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from exporters.graph.quantize import LARGEST
from exporters.weights.storage import Packed
from fluxdeploy.errors import CheckpointError

__all__ = ["pack_weight"]

_TORCH = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
_SCALES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


def pack_weight(
    parts: Iterable[NDArray[np.float32]], shape: tuple[int, int], packed: Packed, name: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A linear's weight [out, in] as the raw bytes of what `Packed.declarations` lists.

    `parts` are the weight's rows in order, some at a time; they are overwritten. Returns bytes
    [in, out] and scales [out] with weight ≈ bytesᵀ · scales. A row's scale maps its largest value
    to the largest of the type and is rounded to the type of scales first, so that the bytes are
    those that fit it best. Raises `CheckpointError` where the weight is not finite, or too large
    for the scales' type.
    """
    rows, columns = shape
    scale_type = _SCALES[packed.scales]
    # NumPy has no bfloat16 and no FP8: bytes pass for all of them.
    narrow = np.empty((columns, rows), np.uint8)
    peaks, scales = torch.empty(rows), torch.empty(rows, dtype=scale_type)
    end = 0
    for part in parts:
        values = torch.from_numpy(part)
        start, end = end, end + len(part)
        peak = torch.maximum(values.amax(1), -values.amin(1))
        if not torch.isfinite(peak).all():
            raise CheckpointError(
                f"Tensor {name} holds NaN or infinity: the checkpoint is damaged."
            )
        scale = (peak / LARGEST[packed.dtype]).clamp(min=torch.finfo(scale_type).tiny)
        scale = torch.where(peak > 0, scale, 1).to(scale_type)
        values /= scale.float()[:, None]
        if packed.dtype == "I8":
            values.round_()
        # No quotient is past the type's end by more than a scale's rounding, 1/512, and rounds to
        # it.
        rounded = values.to(_TORCH[packed.dtype]).view(torch.uint8)
        # Transposed on its own first, which torch does in blocks that fit the cache.
        torch.from_numpy(narrow)[:, start:end] = rounded.t().contiguous()
        peaks[start:end], scales[start:end] = peak, scale
    if not torch.isfinite(scales).all():
        raise CheckpointError(
            f"Tensor {name} holds values up to {peaks.max():.3g}, past what FP16 can scale: "
            "quantize it over bf16."
        )
    return narrow, scales.view(torch.uint8).numpy()
