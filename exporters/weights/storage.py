"""How a quantized weight is stored: its types, its shapes and the names of its scales."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from exporters.formats.nvfp4 import BLOCK

__all__ = ["GLOBAL_SCALE_SUFFIX", "SCALE_SUFFIX", "Packed"]

SCALE_SUFFIX = ".scale"
GLOBAL_SCALE_SUFFIX = ".global_scale"

_STORED = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
}


@dataclass(frozen=True)
class Packed:
    """How a weight [out, in] is stored: `dtype` [in, out], and scales of type `scales`.

    There is a scale for each row, [out], or for F4 one for each block of 16 along a row,
    [in / 16, out], and a float32 scale for all of those. All are parameters of the graph: the
    weight under its own name, the scales with the suffixes `SCALE_SUFFIX` and
    `GLOBAL_SCALE_SUFFIX`. Weights of one `group` have the same scale for all blocks, so that an
    engine can merge their products; one without a name is of none.
    """

    dtype: str
    scales: ir.DataType
    group: str = ""

    def declarations(
        self, name: str, rows: int, columns: int
    ) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, safetensors type and shape of all that a weight [rows, columns] is stored as."""
        weight = name, self.dtype, (columns, rows)
        scales = f"{name}{SCALE_SUFFIX}", _STORED[self.scales]
        if self.dtype != "F4":
            return [weight, (*scales, (rows,))]
        return [
            weight,
            (*scales, (columns // BLOCK, rows)),
            (f"{name}{GLOBAL_SCALE_SUFFIX}", "F32", ()),
        ]
