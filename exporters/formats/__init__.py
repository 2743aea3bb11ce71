"""Number formats of few bits, each with all that is particular to it in one module."""

from __future__ import annotations

from collections.abc import Mapping

from exporters.formats.base import Format, Packed, QuantizedLinear
from exporters.formats.fp8 import FP8
from exporters.formats.int4 import INT4
from exporters.formats.int8 import INT8
from exporters.formats.number_types import EightBits
from exporters.formats.nvfp4 import NVFP4

__all__ = ["FORMATS", "EightBits", "Format", "Packed", "QuantizedLinear"]

FORMATS: Mapping[str, Format] = {known.name: known for known in (FP8, INT8, INT4, NVFP4)}
"""Every format, by the name that `Quantization.format` has for it."""
