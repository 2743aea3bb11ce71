"""A plan's steps for one size of picture, as launches of kernels with their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from engines.cuda import Argument, TensorMap
from engines.native.plan import (
    BYTES,
    Attention,
    Convert,
    Linear,
    Norm,
    Place,
    Plan,
    Rope,
    Rows,
    Step,
)
from engines.native.specs import GROUP_THREADS, GROUPS, PARAMETERS, Kernel, TensorBox
from engines.native.tiles import FEW_ROWS
from engines.native.works import Launchable

__all__ = ["AttentionCall", "Call", "Launch", "Sizes", "list_launches", "partials_bytes"]


@dataclass(frozen=True)
class Sizes:
    """Tokens of text and of the picture."""

    text: int
    image: int

    @property
    def all(self) -> int:
        return self.text + self.image


@dataclass(frozen=True)
class Launch:
    """A kernel, its programs in x and y, and what it is given by the names of its parameters."""

    kernel: Kernel
    grid: tuple[int, int]
    given: Mapping[str, Argument]

    @property
    def values(self) -> list[Argument]:
        """In the order of the kernel's parameters."""
        return [self.given[name] for name in PARAMETERS[self.kernel.function]]


@dataclass(frozen=True)
class AttentionCall:
    """Attention of Q, K, V from `x` to `out`, whose rows are `out_stride` numbers apart."""

    step: Attention
    x: int
    out: int
    out_stride: int


Call: TypeAlias = Launch | AttentionCall
"""One entry of a picture's queue."""


def list_launches(
    plan: Plan,
    works: Sequence[Launchable],
    sizes: Sizes,
    address: Callable[[str], int],
    multiprocessors: int,
) -> list[Call]:
    """All launches of one picture, in order.

    `address` tells where a buffer, a packed tensor, one of the inputs `modulation`, `rope_cos` and
    `rope_sin`, or `partials` or `marks` of `partials_bytes` lies on the device.
    """
    lister = _Lister(plan, sizes, address, multiprocessors)
    return [call for work in works for call in lister.calls(work.steps, work.kernels)]


def partials_bytes(works: Sequence[Launchable], multiprocessors: int) -> tuple[int, int]:
    """Bytes for the sums of tiles that programs share, and for the marks that they are there.

    Fewer tiles than half of the programs are shared, and fewer sums handed on than there are
    programs. A mark is of 4 bytes, for each thread that adds.
    """
    kernels = [k for work in works for k in work.kernels if k.function == "specialized"]
    sums = max((k.tile[0] * k.tile[1] * BYTES["f32"] for k in kernels), default=0)
    return multiprocessors * sums, multiprocessors * GROUPS * GROUP_THREADS * 4


@dataclass(frozen=True)
class _Lister:
    plan: Plan
    sizes: Sizes
    address: Callable[[str], int]
    multiprocessors: int

    def calls(self, steps: tuple[Step, ...], kernels: tuple[Kernel, ...]) -> Iterator[Call]:
        step, *others = steps
        if isinstance(step, Attention):
            stride = self.plan.buffer(step.out.buffer).columns
            yield AttentionCall(step, self._at(step.x), self._at(step.out), stride)
            return
        kernel = kernels[0 if self.sizes.all <= FEW_ROWS else -1]
        if isinstance(step, Linear):
            turn = next((s for s in others if isinstance(s, Rope)), None)
            yield from self._linears(step, turn, kernel)
        elif isinstance(step, Rope):
            yield self._rope(step, kernel)
        elif isinstance(step, Norm):
            yield self._norm(step, kernel)
        else:
            yield self._convert(step, kernel)

    def _convert(self, step: Convert, kernel: Kernel) -> Launch:
        first, count, text = self._rows(step.rows)
        given: dict[str, Argument] = {
            "x": self._pointer(step.x, first),
            "out": self._pointer(step.out, first),
            "text_tokens": ("i32", text),
            **_inverses(step.scale),
        }
        return Launch(kernel, (count, 1), given)

    def _norm(self, step: Norm, kernel: Kernel) -> Launch:
        first, count, text = self._rows(step.rows)
        given: dict[str, Argument] = {
            "x": self._pointer(step.x, first),
            "out": self._pointer(step.out, first),
            "modulation": ("pointer", self.address("modulation")),
            "text_tokens": ("i32", text),
            "shift_text": ("i32", step.shift[0]),
            "shift_image": ("i32", step.shift[1]),
            "gain_text": ("i32", step.gain[0]),
            "gain_image": ("i32", step.gain[1]),
            **_inverses(step.scale),
        }
        return Launch(kernel, (count, 1), given)

    def _rope(self, step: Rope, kernel: Kernel) -> Launch:
        given: dict[str, Argument] = {
            "x": self._pointer(step.x, 0),
            "out": self._pointer(step.out, 0),
            "text_tokens": ("i32", self.sizes.text),
            **self._turn(step, 0),
        }
        # V stays where it is unless it changes its type.
        parts = 2 if step.out == step.x else 3
        return Launch(kernel, (self.sizes.all, parts), given)

    def _turn(self, step: Rope, first: int) -> dict[str, Argument]:
        """What norms and RoPE of rows from `first` on are given."""
        q, k, v = step.scales
        table = first * self.plan.head_dim * BYTES["f32"]
        return {
            "norms": ("pointer", self.address(step.norms)),
            "cos": ("pointer", self.address("rope_cos") + table),
            "sin": ("pointer", self.address("rope_sin") + table),
            "factor_q": ("fp32", step.softmax / q),
            "factor_k": ("fp32", 1 / k),
            "factor_v": ("fp32", 1 / v),
        }

    def _linears(self, step: Linear, turn: Rope | None, kernel: Kernel) -> Iterator[Launch]:
        """One launch, or two where a tile would have rows of both streams, which are not alike."""
        alike = not step.grouped and all(len(set(p)) == 1 for p in (step.gate, step.out_scale))
        apart = not alike and step.rows == "all" and self.sizes.text % kernel.tile[0]
        streams: tuple[Rows, ...] = ("text", "image") if apart else (step.rows,)
        for rows in streams:
            yield self._linear(step, turn, kernel, *self._rows(rows))

    def _linear(
        self, step: Linear, turn: Rope | None, kernel: Kernel, first: int, count: int, text: int
    ) -> Launch:
        x, weight, out, second = kernel.boxes
        size = BYTES[self.plan.buffer(step.x.buffer).kind]
        groups = 2 if step.grouped else 1
        plain = step.split or step.columns
        place = step.out if turn is None else turn.out
        other, rest = place, plain
        if step.second is not None:
            other, rest = step.second, step.columns - plain
        bias = self.address(step.bias)
        nothing: dict[str, Argument] = {
            **dict.fromkeys(("norms", "cos", "sin"), ("pointer", bias)),
            **dict.fromkeys(("factor_q", "factor_k", "factor_v"), ("fp32", 1.0)),
        }
        given: dict[str, Argument] = {
            "x": self._map(step.x, first, count, step.inner, x),
            "weight": TensorMap(
                self.address(step.weight),
                groups * step.columns,
                step.inner,
                step.inner * size,
                size,
                (weight.rows, weight.columns),
                weight.swizzle,
            ),
            "out": self._map(place, first, count, plain, out),
            "second": self._map(other, first, count, rest, second),
            "scale": ("pointer", bias if step.scale is None else self.address(step.scale)),
            "bias": ("pointer", bias),
            "gate": ("pointer", self.address("modulation")),
            "rows": ("i32", count),
            "text_tokens": ("i32", text),
            "gate_text": ("i32", step.gate[0]),
            "gate_image": ("i32", step.gate[1]),
            **_inverses(step.out_scale),
            **(nothing if turn is None else self._turn(turn, first)),
        }
        programs = self.multiprocessors * kernel.programs
        if kernel.function == "specialized":
            given |= {n: ("pointer", self.address(n)) for n in ("partials", "marks")}
        else:
            tiles = -(-count // kernel.tile[0]) * -(-step.columns // kernel.tile[1])
            programs = min(tiles, programs)
        return Launch(kernel, (programs, 1), given)

    def _rows(self, rows: Rows) -> tuple[int, int, int]:
        """First row and number of rows within T, and the first of these that is not text."""
        return {
            "text": (0, self.sizes.text, self.sizes.text),
            "image": (self.sizes.text, self.sizes.image, 0),
            "all": (0, self.sizes.all, self.sizes.text),
        }[rows]

    def _at(self, place: Place, row: int = 0) -> int:
        """The address of a place, from row `row` of T on."""
        buffer = self.plan.buffer(place.buffer)
        if buffer.rows == "image":
            row = 0  # it has no others
        return self.address(place.buffer) + BYTES[buffer.kind] * (
            row * buffer.columns + place.column
        )

    def _pointer(self, place: Place, row: int) -> Argument:
        return "pointer", self._at(place, row)

    def _map(self, place: Place, row: int, rows: int, columns: int, box: TensorBox) -> TensorMap:
        buffer = self.plan.buffer(place.buffer)
        size = BYTES[buffer.kind]
        return TensorMap(
            self._at(place, row),
            rows,
            columns,
            buffer.columns * size,
            size,
            (box.rows, box.columns),
            box.swizzle,
        )


def _inverses(scale: tuple[float, float]) -> dict[str, Argument]:
    return {"inverse_text": ("fp32", 1 / scale[0]), "inverse_image": ("fp32", 1 / scale[1])}
