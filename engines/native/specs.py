"""Which kernel each step of a plan takes, and in which form it is compiled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from engines.native.plan import (
    BYTES,
    Attention,
    Convert,
    Kind,
    Linear,
    Norm,
    Place,
    Plan,
    Rope,
    Step,
)
from fluxdeploy.errors import EngineError

__all__ = [
    "FEW_ROWS",
    "PARAMETERS",
    "Kernel",
    "KernelSpec",
    "TensorBox",
    "Tile",
    "Work",
    "Works",
    "choose_tiles",
    "linear_spec",
    "norm_spec",
    "read_works",
    "rope_spec",
    "schedule",
    "works_metadata",
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
    | {"factor_q": "fp32", "factor_k": "fp32", "factor_v": "fp32"},
}
"""What each kernel is given when it is launched, in order: see `engines.native.kernels`, and
`engines.native.linear` for `specialized`."""


Form: TypeAlias = Literal["pingpong", "shared"]


@dataclass(frozen=True)
class Tile:
    """A tile of a linear's output, and how it is computed.

    rows, columns: its size. warps: of a program. stages: loads of operands that are in flight, each
    of 128 bytes of a row. programs: on a multiprocessor at once. flatten: whether the loads of a
    tile begin while the one before is finished. form: of `engines.native.linear`'s kernel, which
    has its own warps, and as many stages as fit up to these; None for the one of
    `engines.native.kernels`.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int = 1
    flatten: bool = False
    form: Form | None = None

    def __str__(self) -> str:
        if self.form is not None:
            return f"{self.rows}x{self.columns}, {self.form}, {self.stages} stages"
        flat = ", flat" if self.flatten else ""
        return f"{self.rows}x{self.columns}, {self.warps} warps, {self.stages} stages{flat}" + (
            f", {self.programs} programs" if self.programs > 1 else ""
        )


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

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Kernel:
        """Raises `EngineError` for what `asdict` has not made of one."""
        try:
            boxes = tuple(TensorBox(**box) for box in found["boxes"])
            rows, columns = found["tile"]
            return cls(**(dict(found) | {"boxes": boxes, "tile": (rows, columns)}))
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"A kernel of the engine is broken: {error}.") from error


FEW_ROWS = 2304
"""Rows up to which a linear takes the tiles for small pictures."""


@dataclass(frozen=True)
class Work:
    """Steps that are one launch, and its kernel; none for attention, which is cuDNN's.

    A linear may have two, of which `Works` says when each is taken.
    """

    steps: tuple[Step, ...]
    specs: tuple[KernelSpec, ...]


Works: TypeAlias = Sequence[tuple[tuple[Step, ...], tuple[Kernel, ...]]]
"""Steps that are one launch, and its compiled kernels: none; one; or one for up to `FEW_ROWS` rows,
and another for more."""


def schedule(plan: Plan) -> list[Work]:
    """The steps of a plan with their kernels; what one kernel does together is one work.

    That is a linear that makes Q, K and V, with their norms and RoPE, where that is faster: it then
    rounds once, and Q, K and V are not read again before attention.
    """
    works: list[Work] = []
    steps = list(plan.steps)
    while steps:
        step = steps.pop(0)
        if isinstance(step, Linear):
            turn = steps[0] if steps and isinstance(steps[0], Rope) else None
            if turn is None or not _turns(plan, step, turn):
                works.append(Work((step,), _linears(plan, step, None)))
            else:
                works.append(Work((step, steps.pop(0)), _linears(plan, step, turn)))
        else:
            spec = _spec_of(plan, step)
            works.append(Work((step,), () if spec is None else (spec,)))
    return works


_WORKS, _KERNELS = "works", "kernels"


def works_metadata(plan: Plan, kernels: Mapping[str, Kernel]) -> dict[str, str]:
    """What an engine's file says of its launches, for `read_works`; kernels go by `spec.name`."""
    works = [[len(work.steps), [spec.name for spec in work.specs]] for work in schedule(plan)]
    facts = {name: asdict(kernel) for name, kernel in kernels.items()}
    return {_WORKS: json.dumps(works), _KERNELS: json.dumps(facts)}


def read_works(plan: Plan, metadata: Mapping[str, str]) -> Works:
    """The launches that `works_metadata` wrote down.

    The tiles of an engine are those that it was built with, whatever is chosen today. Raises
    `EngineError` for anything else.
    """
    try:
        facts = json.loads(metadata[_KERNELS])
        kernels = {name: Kernel.from_json(found) for name, found in facts.items()}
        works, start = [], 0
        for count, names in json.loads(metadata[_WORKS]):
            steps = plan.steps[start : start + count]
            start += count
            works.append((steps, tuple(kernels[name] for name in names)))
            if not steps or bool(names) == isinstance(steps[0], Attention) or len(names) > 2:
                raise ValueError(f"work {len(works) - 1}")
        if start != len(plan.steps):
            raise ValueError(f"{start} steps of {len(plan.steps)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EngineError(f"The engine's launches are broken: {error}. Build it again.") from error
    return works


def _spec_of(plan: Plan, step: Convert | Norm | Rope | Attention) -> KernelSpec | None:
    if isinstance(step, Attention):
        return None
    out = plan.buffer(step.out.buffer)
    types: dict[str, Kind] = {"x": plan.buffer(step.x.buffer).kind, "out": out.kind}
    if isinstance(step, Convert):
        stride = plan.buffer(step.x.buffer).columns
        return convert_spec(types["x"], types["out"], step.columns, stride, out.columns)
    if isinstance(step, Norm):
        return norm_spec(out.kind, plan.width, out.columns)
    return rope_spec(out.kind, plan.width, plan.head_dim)


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


_HEAD = 128
"""Channels of the heads that a linear norms and turns itself."""


def _turns(plan: Plan, step: Linear, turn: Rope) -> bool:
    """Whether a linear does `turn` too.

    In bfloat16, and where no MLP follows Q, K and V, the product alone gains more.
    """
    kind = plan.buffer(step.x.buffer).kind
    return (
        step.epilogue == "split"
        and kind == "fp8"
        and plan.head_dim == _HEAD
        and turn.x == step.out
        and step.split % _WIDE == step.columns % _WIDE == 0
    )


def _linears(plan: Plan, step: Linear, turn: Rope | None) -> tuple[KernelSpec, ...]:
    """The kernels of a linear, for few rows and for many; they do `turn` too where it is given."""

    def kind(place: Place | None) -> Kind:
        return plan.buffer((place or step.out).buffer).kind

    out = kind(step.out) if turn is None else plan.buffer(turn.out.buffer).kind
    tiles = choose_tiles(kind(step.x), step.columns, step.inner, step.epilogue, step.split)
    specs = [
        linear_spec(
            kind(step.x),
            out,
            kind(step.second) if step.second is not None else out,
            step.columns,
            step.inner,
            step.epilogue,
            split=step.split,
            grouped=step.grouped,
            scaled=step.scale is not None,
            turn=turn is not None,
            tile=tile,
        )
        for tile in tiles
    ]
    return tuple({spec.name: spec for spec in specs}.values())


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


_PIECE = 64
"""Columns that `engines.native.linear` stores at once."""

_SHARED = 231_680
"""Bytes of shared memory for its tensors; its barriers have the rest."""


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
    types |= dict.fromkeys(("norms", "cos", "sin"), "f32")
    return KernelSpec("specialized", types, constants, 4, boxes=boxes)


_WIDE = 256
_PINGPONG = Tile(128, 128, 4, 6, form="pingpong")
_SHARED_TILE = Tile(128, _WIDE, 4, 4, form="shared")
_FLAT = Tile(128, _WIDE, 8, 3, flatten=True)
_SQUARE = Tile(128, 128, 4, 4, flatten=True)

_TILES: Mapping[tuple[Kind, str, bool], tuple[Tile, Tile]] = {
    ("fp8", "plain", False): (_PINGPONG, _PINGPONG),
    ("fp8", "split", False): (_SHARED_TILE, _SHARED_TILE),
    ("fp8", "gelu", False): (_PINGPONG, _PINGPONG),
    ("fp8", "residual", False): (_PINGPONG, _PINGPONG),
    ("fp8", "residual", True): (_SQUARE, _SHARED_TILE),
    ("bf16", "plain", False): (_PINGPONG, _FLAT),
    ("bf16", "split", False): (_SHARED_TILE, _SHARED_TILE),
    ("bf16", "gelu", False): (_PINGPONG, _SHARED_TILE),
    ("bf16", "residual", False): (_PINGPONG, _SHARED_TILE),
    ("bf16", "residual", True): (_SQUARE, _SQUARE),
}
"""For few rows and for many, by whether there are many channels in: the fastest at FLUX.1's sizes
on an H100, of those that `benchmarks/gpu_kernels.py` tries."""

_LONG = 8192


def choose_tiles(x: Kind, columns: int, inner: int, epilogue: str, split: int) -> tuple[Tile, ...]:
    """The tiles of a linear for few rows and for many; small ones where others do not fit."""
    long = inner > _LONG and epilogue == "residual"
    tiles = _TILES[x, epilogue, long]
    if any(columns % tile.columns or split % tile.columns for tile in tiles):
        return (Tile(128, 64, 4, 4),)
    return tiles
