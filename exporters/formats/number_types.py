"""Types of numbers, and how values go through those of 8 bits with one scale for a whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import ml_dtypes
import onnx_ir as ir
import torch
from torch import Tensor

from exporters.formats.graph_edit import GraphEdit, new_node
from fluxdeploy.bundle.tensorfile import DTYPE_BITS

__all__ = ["SCALE_SUFFIX", "SMOOTHING_SUFFIX", "EightBits", "NumberType"]

SCALE_SUFFIX = ".scale"
"""What the name of a scale has after the name of what it scales."""

SMOOTHING_SUFFIX = ".smoothing"
"""What the name of what an input's channels are multiplied with has after that of a weight."""


@dataclass(frozen=True)
class NumberType:
    """A type of numbers: `stored` is its name in safetensors, `onnx_type` in ONNX.

    each: how many numbers, along the last axis, are one of safetensors, which lacks some types.
    """

    stored: str
    onnx_type: ir.DataType
    each: int = field(default=1, kw_only=True)

    @property
    def bits(self) -> int:
        """What a number takes."""
        return DTYPE_BITS[self.stored] // self.each

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that safetensors has for numbers of this shape."""
        return shape if self.each == 1 else (*shape[:-1], shape[-1] // self.each)


@dataclass(frozen=True)
class EightBits(NumberType):
    """A type of 8-bit numbers, `torch_type` in PyTorch.

    largest: the largest of its numbers that is used; a tensor's largest magnitude is mapped to it.
    headroom: how much further than what was measured the static scales of activations reach. They
        were measured over a few prompts, and others go further: over other prompts and seeds by up
        to 1.4 times in single layers, mostly by less than 1.2.
    rounded: what QuantizeLinear gives for quotients, float32 to float32. Those past an end are cut
        off there.
    """

    torch_type: torch.dtype
    largest: float
    headroom: float
    rounded: Callable[[Tensor], Tensor]

    def step(self, largest: float, compute: ir.DataType) -> float:
        """The static scale that maps `largest` to this type's end, not rounded to `compute`."""
        # A scale that FP16 would round to 0 divides by it.
        least = float(ml_dtypes.finfo(compute.numpy()).smallest_normal)  # type: ignore[no-untyped-call]
        return max((largest or 1.0) / self.largest, least)

    def narrow(self, edit: GraphEdit, value: ir.Value, largest: float) -> ir.Value:
        """`value` rounded to this type, with the static scale that maps `largest` to its end."""
        compute = value.dtype
        assert compute is not None
        step = self.step(largest, compute)
        constant = edit.constant(f"{value.name}{SCALE_SUFFIX}", step, compute)
        narrow = new_node(
            "QuantizeLinear",
            [value, constant],
            {f"{value.name}.narrow": self.onnx_type},
            f"{value.name}/QuantizeLinear",
            {"output_dtype": self.onnx_type.value},
        )
        wide = new_node(
            "DequantizeLinear",
            [narrow.outputs[0], constant],
            {f"{value.name}.wide": compute},
            f"{value.name}/DequantizeLinear",
        )
        edit.after(value, narrow, wide)
        return wide.outputs[0]

    def emulate(self, x: Tensor, scale: float) -> Tensor:
        """float32 values as this type has them with a scale; those past its end are cut off."""
        return self.rounded(x / scale) * scale
