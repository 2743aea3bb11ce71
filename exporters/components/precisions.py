"""Which precision a component gets, and which it may have."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fluxdeploy.errors import UsageError
from fluxdeploy.precision import PRECISIONS

__all__ = ["check_precision", "component_compute", "component_precision"]

_FLOATS = tuple(name for name, row in PRECISIONS.items() if row.quantization is None)

_OVERFLOW_FP16 = ("t5", "vae_decoder", "vae_encoder")
"""Components whose values leave float16's range; bfloat16 has float32's."""

_ALLOWED: Mapping[str, Collection[str]] = {
    "transformer": PRECISIONS,
    "conditioner": (*_FLOATS, "fp8-weights", "int8-weights"),
    "t5": (*_FLOATS, "fp8-weights", "int8-weights"),
}


def component_precision(component: str, precision: str) -> str:
    """The precision of a component where the transformer's is `precision`."""
    if component == "transformer":
        return precision
    row = PRECISIONS[precision]
    chosen = row.others.get(component, row.rest)
    return "bf16" if chosen == "fp16" and component in _OVERFLOW_FP16 else chosen


def component_compute(component: str, precision: str, compute: str) -> str:
    """What a component computes in, where a runtime computes in `compute` around quantized weights.

    float32 for a quantized T5 where that is float16, which it overflows.
    """
    quantized = PRECISIONS[precision].quantization is not None
    return "fp32" if component in _OVERFLOW_FP16 and quantized and compute == "fp16" else compute


def check_precision(component: str, precision: str) -> None:
    """Raise `UsageError` for a precision that a component is not built in."""
    allowed = _ALLOWED.get(component, _FLOATS)
    if precision not in allowed:
        raise UsageError(
            f"Precision {precision!r} is not one of {component}'s; those are {', '.join(allowed)}."
        )
