"""FP8: E4M3 numbers, which round by up to 1/16 of a value, whatever its size."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from exporters.formats.number_types import EightBits
from exporters.formats.row_scales import RowScaled

__all__ = ["E4M3", "FP8"]


def _rounded(quotients: Tensor) -> Tensor:
    return quotients.clamp(-448, 448).to(torch.float8_e4m3fn).float()


E4M3 = EightBits(
    stored="F8_E4M3",
    onnx_type=ir.DataType.FLOAT8E4M3FN,
    torch_type=torch.float8_e4m3fn,
    largest=448.0,
    # A floating-point type: a scale twice as large costs it nothing but its very smallest values.
    headroom=2.0,
    rounded=_rounded,
)

FP8 = RowScaled("fp8", E4M3, activations=(None, "static"), attention=E4M3)
