"""What a native engine computes: a list of steps over named buffers, as its file holds it.

Sizes: S text tokens, L image tokens, T = S + L, D width, M the width of an MLP. Both streams lie in
one buffer, text first, so that joining and splitting them costs nothing. A plan is for one picture;
the pictures of a batch go one after the other.

A number in E4M3 stands for itself times the scale of its buffer, which is given where it is written
and folded into the vectors of whoever reads it. Pairs of numbers are for text and image.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, cast, get_args, get_origin, get_type_hints

from fluxdeploy.bundle.typed_json import FieldError, join, load_strict, shortened
from fluxdeploy.errors import EngineError

__all__ = [
    "BYTES",
    "Attention",
    "Buffer",
    "Convert",
    "Kind",
    "Linear",
    "Norm",
    "Packed",
    "Pair",
    "Part",
    "Place",
    "Plan",
    "Rope",
    "Rows",
    "Step",
    "typed",
]

Kind: TypeAlias = Literal["f32", "bf16", "fp8"]
Rows: TypeAlias = Literal["text", "image", "all"]
"""Tokens of a buffer: the first S, the last L, or all T. A buffer of `text` or `image` rows has
no others, and a step's rows are then all of them."""
Pair: TypeAlias = tuple[float, float]

BYTES: Mapping[Kind, int] = {"f32": 4, "bf16": 2, "fp8": 1}
"""Of a number."""


@dataclass(frozen=True)
class Buffer:
    """Activations [rows, columns], row after row. Inputs and outputs of the engine are f32."""

    name: str
    rows: Rows
    columns: int
    kind: Kind


@dataclass(frozen=True)
class Place:
    """Columns of a buffer, from `column` on."""

    buffer: str
    column: int = 0


@dataclass(frozen=True)
class Part:
    """One initializer of the graph, as it goes into a packed tensor.

    source: its name. scale: an initializer [N] that a stored 8-bit weight is multiplied by, where
    the packed tensor has no 8 bits. transpose: whether the graph has it as [K,N]. columns: an
    initializer [K] that its columns are multiplied by. factor: what its numbers are multiplied by.
    """

    source: str
    scale: str | None = None
    transpose: bool = False
    columns: str | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Packed:
    """A tensor of the engine's file: its parts one below the other."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Convert:
    """out = x / scale in the type of out, element by element; in 8 bits rounded and saturated.

    `rows` are those of both; `scale` is (1, 1) where out has more than 8 bits.
    """

    x: Place
    out: Place
    columns: int
    rows: Rows
    scale: Pair = (1.0, 1.0)


@dataclass(frozen=True)
class Norm:
    """out = (LayerNorm(x) · (1 + modulation[scale row]) + modulation[shift row]) / scale.

    x bfloat16 [.., D]; ε is 1e-6. `shift` and `gain` are rows of the modulation, of text and image.
    """

    x: Place
    out: Place
    rows: Rows
    shift: tuple[int, int]
    gain: tuple[int, int]
    scale: Pair = (1.0, 1.0)


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ · scale + bias, and what follows it.

    x [.., inner] and weight [groups · columns, inner] have one type. With `grouped` text rows have
    the first half of weight, scale and bias, and image rows the second. `scale` and `bias` are f32
    [groups · columns]; no scale is 1.
    epilogue: `plain` writes y to `out`; `gelu` the tanh form of GELU of it, divided by `out_scale`;
        `residual` adds modulation[gate] · y to `out`, which is bfloat16; `split` does `plain` with
        the first `split` columns, and `gelu` with the others, to `second`.
    """

    x: Place
    out: Place
    rows: Rows
    weight: str
    bias: str
    inner: int
    columns: int
    epilogue: Literal["plain", "gelu", "residual", "split"]
    grouped: bool = False
    scale: str | None = None
    gate: tuple[int, int] = (0, 0)
    out_scale: Pair = (1.0, 1.0)
    split: int = 0
    second: Place | None = None


@dataclass(frozen=True)
class Rope:
    """RMSNorm of the heads of Q and K (ε 1e-6), RoPE, and Q times `softmax`; V as it is.

    x bfloat16 [T, 3 D]: Q, K, V, with heads side by side. `norms` is f32 [4, head_dim]: the
    weights for text Q, text K, image Q, image K. out [T, 3 D] is x itself in bfloat16, and in 8
    bits another buffer, with a scale for each of Q, K and V.
    """

    x: Place
    out: Place
    norms: str
    softmax: float
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Attention:
    """softmax(Q Kᵀ) V, of x [T, 3 D] as `Rope` leaves it, to out [T, D] in the same type.

    In 8 bits the softmax is written in steps of `softmax_scale`, and out in steps of `out_scale`.
    """

    x: Place
    out: Place
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    softmax_scale: float = 1.0
    out_scale: float = 1.0


Step: TypeAlias = Convert | Norm | Linear | Rope | Attention

_STEPS = {kind.__name__: kind for kind in (Convert, Norm, Linear, Rope, Attention)}


@dataclass(frozen=True)
class Plan:
    """A transformer as steps. Inputs and output are the buffers of these names.

    `inputs` are hidden_states [L, in_channels], context [S, D], modulation [rows, D], rope_cos and
    rope_sin [T, head_dim]; the last three are no buffers of tokens' rows and are not in `buffers`.
    """

    width: int
    head_dim: int
    modulation_rows: int
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    packed: tuple[Packed, ...]

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    def buffer(self, name: str) -> Buffer:
        return next(buffer for buffer in self.buffers if buffer.name == name)

    def to_json(self) -> str:
        """The plan, without how its tensors were packed."""
        steps = [{"step": type(step).__name__} | asdict(step) for step in self.steps]
        return json.dumps(
            {
                "width": self.width,
                "head_dim": self.head_dim,
                "modulation_rows": self.modulation_rows,
                "buffers": [asdict(buffer) for buffer in self.buffers],
                "steps": steps,
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises `EngineError` for what `to_json` has not written.

        Types are checked, and no more: see `engines.native.check`.
        """
        try:
            found = load_strict(text)
            if not isinstance(found, dict) or found.keys() != _PLAN:
                raise FieldError("", f"it must be an object of {', '.join(sorted(_PLAN))}")
            steps = typed(tuple[object, ...], found.pop("steps"), "steps")
            hints = get_type_hints(cls)
            others = {name: typed(hints[name], value, name) for name, value in found.items()}
            made = tuple(_step(step, f"steps[{index}]") for index, step in enumerate(steps))
            return cls(steps=made, packed=(), **others)
        except ValueError as error:
            raise EngineError(f"The engine's plan is broken: {error}.") from error


_PLAN = {"width", "head_dim", "modulation_rows", "buffers", "steps"}


def _step(found: Any, where: str) -> Step:
    name = found.pop("step", None) if isinstance(found, dict) else None
    if not isinstance(name, str) or name not in _STEPS:
        raise FieldError(where, f"must be one of the steps {', '.join(_STEPS)}")
    step: Step = typed(_STEPS[name], found, where)
    return step


def typed(hint: Any, value: Any, where: str) -> Any:
    """A value of JSON as a type hint says, of dataclasses, tuples and dicts.

    Raises `FieldError`.
    """
    kind, options = get_origin(hint), get_args(hint)
    if kind is types.UnionType:
        return None if value is None else typed(options[0], value, where)
    if kind is tuple and type(value) is list:
        items = [options[0]] * len(value) if options[-1] is Ellipsis else options
        if len(items) == len(value):
            numbered = enumerate(zip(items, value, strict=True))
            return tuple(typed(item, entry, f"{where}[{i}]") for i, (item, entry) in numbered)
    elif kind is dict and type(value) is dict:
        return {key: typed(options[1], entry, join(where, key)) for key, entry in value.items()}
    elif is_dataclass(hint) and type(value) is dict:
        hints = _hints(cast(Any, hint))
        if value.keys() == hints.keys():
            made = {key: typed(hints[key], value[key], join(where, key)) for key in hints}
            return cast(Any, hint)(**made)
    elif kind is Literal:
        if value in options:
            return value
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint is object or type(value) is hint:
        return value
    raise FieldError(where, f"must not be {shortened(repr(value))}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
