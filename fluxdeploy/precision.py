"""The precisions that a component can be built in: one row of `PRECISIONS` each.

A row says what is quantized and how, how far an engine may be from PyTorch, and what the other
components get where the transformer has it. How a format stores, computes and rounds is a module of
`exporters.formats`; what a component allows is declared with the component.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["DEFAULT_PRECISION", "PRECISIONS", "Precision", "Quantization"]

DEFAULT_PRECISION = "bf16"
"""Of a transformer, where none is named."""


@dataclass(frozen=True)
class Quantization:
    """What is quantized: the weights of the large linears, perhaps their inputs, and attention.

    `format` is a module of `exporters.formats`: fp8, int8, int4 or nvfp4. `activations` says
    whether a linear's input gets a scale that was measured before (static), one that is computed
    every time (dynamic), or stays as it is (None). With `attention` its Q, K, V and softmax output
    are quantized too, in the format's own 8 bits.
    """

    format: Literal["fp8", "int8", "int4", "nvfp4"]
    activations: Literal["static", "dynamic"] | None = None
    attention: bool = False


@dataclass(frozen=True)
class Precision:
    """What a component computes in.

    quantization: None where nothing is quantized; the name is then that of the type.
    max_error, min_cosine: a component's gate, the largest error relative to the largest output and
        the smallest cosine that an engine may have against PyTorch in float32.
    min_psnr, min_ssim, min_sqnr: what `verify` holds whole pictures and single quantized layers
        against where the transformer has the precision, both ratios in dB.
    others: what other components get where the transformer has it, by name; `rest` is for those
        that are not named.
    """

    name: str
    max_error: float
    min_cosine: float
    min_psnr: float
    min_ssim: float
    min_sqnr: float | None = None
    quantization: Quantization | None = None
    rest: str = "bf16"
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def calibrated(self) -> bool:
        """Whether it has static scales, for which activations have to be measured."""
        return self.quantization is not None and self.quantization.activations == "static"


# The conditioner's AdaLN linears are products with one vector a picture, where only the weights'
# bytes count.
_FP8 = {"conditioner": "fp8-weights"}
_INT8 = {"conditioner": "int8-weights", "t5": "int8-weights"}
_INT4 = {"conditioner": "int4-weights", "t5": "int8-weights"}
_FP4 = {"conditioner": "fp8-weights", "t5": "fp8-weights"}

# Components: a row of a linear that holds one outlier has few of int8's steps left for the rest:
# `demo:dev`'s T5 in int8-weights is off by 0.13 at one place, with a cosine of 0.998. In INT4 its
# cosine is 0.93: T5 stays in 8 bits. The demo's transformers in INT4 are off by 0.17 with a cosine
# of 0.990, its conditioners by 0.02 with one of 0.9999.
#
# Layers: E4M3 rounds by up to 1/16 of a value, whatever its size: the worst linears of the demo
# checkpoints have 30 dB with quantized weights alone and 27 with their inputs, and less means a
# wrong scale. Q, K and V have 31 dB there. Attention's output has 27, and 21 with random weights,
# where all shares of a row round the same way; a scale that is 16 times too small leaves 6 at most.
# INT8's steps are as wide as the largest value of a tensor demands: 33 dB there, and outliers cost
# 20. FP4's linears have 16.6 dB at least there and 20 in the median, those with INT4 weights 17.9
# at least; most have the 21 that blocks of Gaussian numbers have.
#
# Pictures: the medians over the demo checkpoints' pictures are over 40 dB in 8 bits, but one
# picture may have to do, and single ones have 25 where a step goes another way. With INT4 weights
# the medians are 49 dB, and the worst of 32 pictures has 18, or 13 where the conditioner has 8
# bits: chance decides which way such a step goes. What FP4 leaves of whole pictures is an estimate,
# for want of a GPU that has it.
_ROWS = (
    Precision("fp32", 1e-3, 0.99999, 45.0, 0.99, rest="fp32"),
    Precision("bf16", 1e-1, 0.995, 25.0, 0.85),
    Precision("fp16", 5e-2, 0.999, 30.0, 0.9, rest="fp16"),
    Precision(
        "fp8", 2.5e-1, 0.99, 22.0, 0.82, 16.0, Quantization("fp8", "static", True), others=_FP8
    ),
    Precision(
        "fp8-linears", 2.5e-1, 0.99, 22.0, 0.82, 20.0, Quantization("fp8", "static"), others=_FP8
    ),
    Precision("fp8-weights", 1e-1, 0.995, 25.0, 0.85, 24.0, Quantization("fp8"), others=_FP8),
    Precision("int8", 2.5e-1, 0.99, 20.0, 0.8, 12.0, Quantization("int8", "static"), others=_INT8),
    Precision(
        "int8-dynamic", 2e-1, 0.995, 24.0, 0.82, 15.0, Quantization("int8", "dynamic"), others=_INT8
    ),
    Precision("int8-weights", 2e-1, 0.995, 25.0, 0.85, 20.0, Quantization("int8"), others=_INT8),
    Precision("int4-weights", 4e-1, 0.95, 15.0, 0.6, 12.0, Quantization("int4"), others=_INT4),
    Precision(
        "fp4", 5e-1, 0.95, 15.0, 0.6, 12.0, Quantization("nvfp4", "static", True), others=_FP4
    ),
)

PRECISIONS: Mapping[str, Precision] = {row.name: row for row in _ROWS}
"""Every precision by its name, in the order in which they are offered."""
