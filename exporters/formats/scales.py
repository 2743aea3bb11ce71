"""What the scales of every format have in common: their types, and the weights that have none."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from fluxdeploy.errors import CheckpointError

__all__ = ["SCALE_TYPES", "check_finite", "check_scales"]

SCALE_TYPES: Mapping[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
"""The types that products compute in, as PyTorch has them."""


def check_finite(peaks: Tensor, name: str) -> None:
    """Raise `CheckpointError` where the largest values of the weight `name` are not finite."""
    if not torch.isfinite(peaks).all():
        raise CheckpointError(f"Tensor {name} holds NaN or infinity: the checkpoint is damaged.")


def check_scales(scales: Tensor, largest: Tensor, name: str) -> None:
    """Raise `CheckpointError` where float16 could not hold scales of the weight `name`.

    `largest` is the largest magnitude in it.
    """
    if not torch.isfinite(scales).all():
        raise CheckpointError(
            f"Tensor {name} holds values up to {largest:.3g}, past what FP16 can scale: "
            "quantize it over bf16."
        )
