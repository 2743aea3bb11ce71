"""The number formats that TensorRT has kernels for."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["FORMATS"]

FORMATS: Mapping[str, tuple[str, str]] = {
    "fp8": ("fp8", "fp8"),
    "int8": ("int8", "int8"),
    "int4": ("int4", "fp8"),
    "nvfp4": ("fp4", "fp8"),
}
"""The formats that there are kernels for, with the types of their linears and attentions."""
