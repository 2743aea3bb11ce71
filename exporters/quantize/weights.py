"""Quantized weights: one scale for each row of a linear, and the rows as 8-bit numbers.

Those of 4 bits are in `exporters.quantize.fp4`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from exporters.quantize.fp4 import pack_fp4
from exporters.quantize.graph import LARGEST
from exporters.quantize.storage import Packed
from fluxdeploy.errors import CheckpointError

__all__ = ["pack_weight"]

_TORCH = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
_SCALES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


def pack_weight(
    weight: NDArray[np.float32], packed: Packed, name: str, largest: float | None = None
) -> tuple[NDArray[Any], ...]:
    """A linear's weight [out, in] as the raw bytes of what `Packed.declarations` lists.

    In 8 bits those are bytes [in, out] and scales [out] with weight ≈ bytesᵀ · scales. A row's
    scale maps its largest value to the largest of the type and is rounded to the type of scales
    first, so that the bytes are those that fit it best. `weight` is overwritten. For F4, `largest`
    is the largest magnitude of the weights that share a scale with this one. Raises
    `CheckpointError` where `weight` is not finite, or too large for the scales' type.
    """
    if packed.dtype == "F4":
        return pack_fp4(weight, name, largest)
    values = torch.from_numpy(weight)
    peaks = torch.maximum(values.amax(1), -values.amin(1))
    if not torch.isfinite(peaks).all():
        raise CheckpointError(f"Tensor {name} holds NaN or infinity: the checkpoint is damaged.")
    scale_type = _SCALES[packed.scales]
    scales = (peaks / LARGEST[packed.dtype]).clamp(min=torch.finfo(scale_type).tiny)
    scales = torch.where(peaks > 0, scales, 1).to(scale_type)
    if not torch.isfinite(scales).all():
        raise CheckpointError(
            f"Tensor {name} holds values up to {peaks.max():.3g}, past what FP16 can scale: "
            "quantize it over bf16."
        )
    values /= scales.float()[:, None]
    if packed.dtype == "I8":
        values.round_()
    # No quotient is past the type's end by more than a scale's rounding, 1/512, and rounds to it.
    narrow = values.to(_TORCH[packed.dtype]).t().contiguous()
    # NumPy has no bfloat16 and no FP8: bytes pass for all of them.
    return narrow.view(torch.uint8).numpy(), scales.view(torch.uint8).numpy()
