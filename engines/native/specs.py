"""The kernels' forms: what each is given, and what it is compiled from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from engines.native.plan import BYTES, Kind
from engines.native.tiles import Form, Tile

__all__ = [
    "GROUPS",
    "GROUP_THREADS",
    "PARAMETERS",
    "Kernel",
    "KernelSpec",
    "TensorBox",
    "convert_spec",
    "linear_spec",
    "norm_spec",
    "rope_spec",
]

_TENSORS = {
    "x": "box",
    "weight": "box",
    "out": "box",
    "second": "box",
    "scale": "pointer",
    "bias": "pointer",
    "gate": "pointer",
}
_NUMBERS = {
    "rows": "i32",
    "text_tokens": "i32",
    "gate_text": "i32",
    "gate_image": "i32",
    "inverse_text": "fp32",
    "inverse_image": "fp32",
}

PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "convert": {
        "x": "pointer",
        "out": "pointer",
        "text_tokens": "i32",
        "inverse_text": "fp32",
        "inverse_image": "fp32",
    },
    "norm": {
        "x": "pointer",
        "out": "pointer",
        "modulation": "pointer",
        "text_tokens": "i32",
        "shift_text": "i32",
        "shift_image": "i32",
        "gain_text": "i32",
        "gain_image": "i32",
        "inverse_text": "fp32",
        "inverse_image": "fp32",
    },
    "rope": {
        "x": "pointer",
        "out": "pointer",
        "norms": "pointer",
        "cos": "pointer",
        "sin": "pointer",
        "text_tokens": "i32",
        "factor_q": "fp32",
        "factor_k": "fp32",
        "factor_v": "fp32",
    },
    "linear": _TENSORS | _NUMBERS,
    "specialized": _TENSORS
    | {"norms": "pointer", "cos": "pointer", "sin": "pointer"}
    | _NUMBERS
    | {"factor_q": "fp32", "factor_k": "fp32", "factor_v": "fp32"}
    | {"partials": "pointer", "marks": "pointer"},
}
"""What each kernel is given when it is launched, in order: see `engines.native.kernels`, and
`engines.native.linear` for `specialized`."""


@dataclass(frozen=True)
class KernelSpec:
    """A kernel in one form.

    types: the elements of its tensors, by parameter. constants: what is known when it is compiled.
    boxes: rows and columns of what is loaded or stored at once, of parameters that are boxes.
    programs: on a multiprocessor at once, of a kernel whose programs take tiles in turns.
    """

    function: str
    types: Mapping[str, Kind]
    constants: Mapping[str, int | str]
    warps: int
    stages: int = 1
    programs: int = 1
    boxes: Mapping[str, tuple[int, int]] | None = None

    @property
    def name(self) -> str:
        """The function, and a hash of its form."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.function}.{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class TensorBox:
    """What a kernel moves of a tensor at once. `swizzle` is the driver's number of a pattern."""

    rows: int
    columns: int
    swizzle: int


@dataclass(frozen=True)
class Kernel:
    """What is known of a compiled kernel: its cubin lies beside it.

    entry: the function in the cubin. threads: of a program. shared: its bytes of shared memory.
    boxes: of its parameters that are boxes, in order. tile: rows and columns of what a program
        makes at once.
    """

    name: str
    function: str
    entry: str
    threads: int
    shared: int
    boxes: tuple[TensorBox, ...]
    tile: tuple[int, int]
    programs: int


def convert_spec(x: Kind, out: Kind, columns: int, stride: int, out_stride: int) -> KernelSpec:
    """Columns of rows that are `stride` numbers apart, in another type."""
    constants = {
        "COLUMNS": columns,
        "X_STRIDE": stride,
        "OUT_STRIDE": out_stride,
        "BLOCK": _power_of_2(columns),
    }
    return KernelSpec("convert", {"x": x, "out": out}, constants, 4)


def norm_spec(out: Kind, width: int, out_stride: int) -> KernelSpec:
    """LayerNorm of bfloat16 rows of `width`."""
    constants = {"WIDTH": width, "OUT_STRIDE": out_stride, "BLOCK": _power_of_2(width)}
    return KernelSpec("norm", {"x": "bf16", "out": out, "modulation": "f32"}, constants, 4)


def rope_spec(out: Kind, width: int, head_dim: int) -> KernelSpec:
    """RMSNorm and RoPE of bfloat16 rows [3, width]."""
    constants = {
        "WIDTH": width,
        "HEAD_DIM": head_dim,
        "BLOCK_HEADS": _power_of_2(width // head_dim),
    }
    types: dict[str, Kind] = {"x": "bf16", "out": out, "norms": "f32", "cos": "f32", "sin": "f32"}
    return KernelSpec("rope", types, constants, 4)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def linear_spec(
    x: Kind,
    out: Kind,
    second: Kind,
    columns: int,
    inner: int,
    epilogue: str,
    split: int,
    grouped: bool,
    scaled: bool,
    turn: bool,
    tile: Tile,
) -> KernelSpec:
    """A linear of [.., inner] to [.., columns], with `Linear`'s epilogue.

    With `turn` its first `split` columns are Q, K and V, and it does what `Rope` says too. Its tile
    must have a form for that.
    """
    depth = 128 // BYTES[x]
    constants: dict[str, int | str] = {
        "COLUMNS": columns,
        "INNER": inner,
        "TILE_ROWS": tile.rows,
        "TILE_COLUMNS": tile.columns,
        "DEPTH": depth,
        "EPILOGUE": epilogue,
        "SPLIT": split,
        "GROUPED": int(grouped),
        "SCALED": int(scaled),
    }
    types: dict[str, Kind] = {"x": x, "weight": x, "out": out, "second": second}
    types |= dict.fromkeys(("scale", "bias", "gate"), "f32")
    if tile.form is not None:
        return _specialized_spec(types, constants, turn, tile, tile.form)
    if turn:
        raise ValueError(f"the tile {tile} has no norms and no RoPE")
    half = tile.columns // 2
    narrow = (second if epilogue == "split" else out) == "fp8"
    constants["FLATTEN"] = int(tile.flatten)
    constants["NARROW"] = int(narrow and epilogue in ("gelu", "split"))
    boxes = {
        "x": (tile.rows, depth),
        "weight": (tile.columns, depth),
        "out": (tile.rows, half),
        "second": (tile.rows, half),
    }
    return KernelSpec("linear", types, constants, tile.warps, tile.stages, tile.programs, boxes)


GROUPS, GROUP_THREADS = 2, 128
"""Of `engines.native.linear`: those that multiply."""

_PIECE = 64
"""Columns that `engines.native.linear` stores at once."""

_SHARED = 231_680
"""Bytes of shared memory for its tensors; its barriers have the rest."""


def _most_parts(steps: int) -> int:
    """Into how many parts a tile is shared out at most.

    Each takes an equal share of the steps, and the last one then adds what the others have left,
    which takes as long as about two steps for each of them.
    """
    return max(1, math.isqrt(steps // 2))


def _specialized_spec(
    types: dict[str, Kind], constants: dict[str, int | str], turn: bool, tile: Tile, form: Form
) -> KernelSpec:
    depth = int(constants["DEPTH"])
    rows = tile.rows if form == "pingpong" else tile.rows // 2
    boxes = {
        "x": (rows, depth),
        "weight": (tile.columns, depth),
        "out": (rows, _PIECE),
        "second": (rows, _PIECE),
    }
    residual = constants["EPILOGUE"] == "residual"
    pieces = tile.columns // _PIECE if residual else 2
    wide = max(BYTES[types[name]] for name in ("out", "second"))
    staged = 2 * pieces * rows * _PIECE * wide
    vectors = 2 * 4 * tile.columns * (2 if residual or constants["SCALED"] else 1)
    stages = (_SHARED - staged - vectors) // (128 * (tile.rows + tile.columns))
    constants |= {"TURN": int(turn), "FORM": form, "STAGES": min(stages, tile.stages)}
    constants["PARTS"] = 1
    if form == "shared" and residual:
        # The others have so many tiles that none, or too many, are left for the last turn.
        constants["PARTS"] = _most_parts(int(constants["INNER"]) // depth)
    types |= dict.fromkeys(("norms", "cos", "sin", "partials", "marks"), "f32")
    return KernelSpec("specialized", types, constants, 4, boxes=boxes)
