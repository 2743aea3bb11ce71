"""What a native engine computes: a list of steps over named buffers, as its file holds it.

Sizes: S text tokens, L image tokens, T = S + L, D width, M the width of an MLP. Both streams lie in
one buffer, text first, so that joining and splitting them costs nothing. A plan is for one picture;
the pictures of a batch go one after the other.

A number in E4M3 stands for itself times the scale of its buffer, which is given where it is written
and folded into the vectors of whoever reads it. Pairs of numbers are for text and image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

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
    the packed tensor has no 8 bits. transpose: whether the graph has it as [K,N]. factor: what
    its numbers are multiplied by.
    """

    source: str
    scale: str | None = None
    transpose: bool = False
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
        """Raises `EngineError` for what `to_json` has not written."""
        try:
            found = json.loads(text)
            return cls(
                found["width"],
                found["head_dim"],
                found["modulation_rows"],
                tuple(Buffer(**buffer) for buffer in found["buffers"]),
                tuple(_step(step) for step in found["steps"]),
                (),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"The engine's plan is broken: {error}.") from error


def _step(found: Mapping[str, Any]) -> Step:
    kind = _STEPS[found["step"]]
    values = {f.name: found[f.name] for f in fields(kind)}
    for name, value in values.items():
        if isinstance(value, dict):
            values[name] = Place(**value)
        elif isinstance(value, list):
            values[name] = tuple(value)
    return kind(**values)
