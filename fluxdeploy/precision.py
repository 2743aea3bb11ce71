"""The precisions that a component can be built in, and which goes with which.

docs/bundle.md has the same table in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fluxdeploy.errors import UsageError

__all__ = [
    "FLOATS",
    "PRECISIONS",
    "QUANTIZED",
    "Quantization",
    "check_precision",
    "component_compute",
    "component_precision",
    "needs_ranges",
]

FLOATS = ("fp32", "bf16", "fp16")
"""The precisions in which nothing is quantized."""


@dataclass(frozen=True)
class Quantization:
    """What is quantized: the weights of the large linears, perhaps their inputs, and attention.

    `weights` is the safetensors name of the type that they are stored in. 8-bit types have one
    scale a row. F4 is NVFP4: E2M1 numbers with an E4M3 scale for every 16 along a row, and one
    float32 scale for all of those.
    `activations` says whether a linear's input gets a scale that was measured before (static), one
    that is computed every time (dynamic), or stays as it is (None). For F4 the measured scale is
    the one for all blocks, and that of a block is computed every time.
    With `attention` its Q, K, V and softmax output are in `eight_bits`.
    """

    weights: Literal["F8_E4M3", "I8", "F4"]
    activations: Literal["static", "dynamic"] | None = None
    attention: bool = False

    @property
    def eight_bits(self) -> Literal["F8_E4M3", "I8"]:
        """The 8-bit type that goes with `weights`: E4M3 with E2M1, else the same."""
        return "F8_E4M3" if self.weights == "F4" else self.weights


QUANTIZED: Mapping[str, Quantization] = {
    "fp8": Quantization("F8_E4M3", "static", attention=True),
    "fp8-linears": Quantization("F8_E4M3", "static"),
    "fp8-weights": Quantization("F8_E4M3"),
    "int8": Quantization("I8", "static"),
    "int8-dynamic": Quantization("I8", "dynamic"),
    "int8-weights": Quantization("I8"),
    "fp4": Quantization("F4", "static", attention=True),
}

PRECISIONS = (*FLOATS, *QUANTIZED)

# T5 and the VAE overflow FP16; bfloat16 has float32's range. The conditioner's AdaLN linears are
# products with one vector a picture, where only the weights' bytes count.
_OTHERS: Mapping[str, Mapping[str, str]] = {
    "fp16": {"t5": "bf16", "vae_decoder": "bf16", "vae_encoder": "bf16"},
    "fp8": {"conditioner": "fp8-weights"},
    "int8": {"conditioner": "int8-weights", "t5": "int8-weights"},
    "fp4": {"conditioner": "fp8-weights", "t5": "fp8-weights"},
}
_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "transformer": PRECISIONS,
    "conditioner": (*FLOATS, "fp8-weights", "int8-weights"),
    "t5": (*FLOATS, "fp8-weights", "int8-weights"),
}


def component_precision(component: str, precision: str) -> str:
    """The precision of a component where the transformer's is `precision`."""
    if component == "transformer":
        return precision
    family = precision.partition("-")[0]
    usual = "bf16" if precision in QUANTIZED else precision
    return _OTHERS.get(family, {}).get(component, usual)


def component_compute(component: str, precision: str, compute: str) -> str:
    """What a component computes in, where a runtime computes in `compute` around quantized weights.

    float32 for a quantized T5 where that is float16, which it overflows.
    """
    overflows = component == "t5" and precision in QUANTIZED and compute == "fp16"
    return "fp32" if overflows else compute


def check_precision(component: str, precision: str) -> None:
    """Raise `UsageError` for a precision that a component is not built in."""
    allowed = _ALLOWED.get(component, FLOATS)
    if precision not in allowed:
        raise UsageError(
            f"Precision {precision!r} is not one of {component}'s; those are {', '.join(allowed)}."
        )


def needs_ranges(precision: str) -> bool:
    """Whether a precision has static scales, for which activations have to be measured."""
    quantization = QUANTIZED.get(precision)
    return quantization is not None and quantization.activations == "static"
