"""Whether a plan's steps stay within their buffers and tensors: a GPU would not tell.

This is for files that are broken. One from somebody who means harm holds code of theirs as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engines.native.plan import (
    Attention,
    Buffer,
    Convert,
    Kind,
    Linear,
    Norm,
    Place,
    Plan,
    Rope,
    Rows,
    Step,
)

__all__ = ["check_plan"]

_MOST = 32_000
"""Columns, channels and rows of anything: kernels count the numbers of a buffer in 31 bits, and a
picture may have 66,048 tokens. FLUX.1 has 21,504 at most."""

_TABLES = ("modulation", "rope_cos", "rope_sin")
"""Inputs that are no buffers."""

_IN_OUT: Mapping[str, tuple[Rows, Kind]] = {
    "hidden_states": ("image", "f32"),
    "context": ("text", "f32"),
    "velocity": ("image", "f32"),
}


def check_plan(plan: Plan, tensors: Mapping[str, tuple[Kind, tuple[int, ...]]]) -> None:
    """Raise `ValueError`, saying what is wrong, for a plan that reads or writes past anything.

    `tensors` are the kinds and shapes of what the engine's file holds.
    """
    buffers = {buffer.name: buffer for buffer in plan.buffers}
    names = [*buffers, *tensors, *_TABLES]
    alone = len(buffers) == len(plan.buffers) and len(set(names)) == len(names)
    _hold(alone, "two of its tensors have one name")
    wide = sorted(b.name for b in plan.buffers if b.kind == "f32" and b.name not in _IN_OUT)
    _hold(not wide, f"it keeps {', '.join(wide)} in f32")
    for name, (rows, kind) in _IN_OUT.items():
        found = buffers.get(name)
        fits = found is not None and (found.rows, found.kind) == (rows, kind)
        _hold(fits, f"it has no buffer {name} of {rows} tokens in {kind}")
    _hold(buffers["context"].columns == plan.width, "the context is not as wide as the model")
    sizes = (plan.width, plan.head_dim, plan.modulation_rows, *(b.columns for b in plan.buffers))
    _hold(all(0 < size <= _MOST for size in sizes), f"its sizes are not all between 1 and {_MOST}")
    even = plan.width % plan.head_dim == 0 and plan.head_dim % 2 == 0
    _hold(even, f"{plan.width} channels are not heads of {plan.head_dim}")
    written = {"hidden_states", "context"}
    for index, step in enumerate(plan.steps):
        check = _Check(plan, buffers, tensors, f"its step {index}, a {type(step).__name__},")
        check.step(step)
        check.order(step, written)


@dataclass(frozen=True)
class _Check:
    """The check of one step, which `name` tells of."""

    plan: Plan
    buffers: Mapping[str, Buffer]
    tensors: Mapping[str, tuple[Kind, tuple[int, ...]]]
    name: str

    def step(self, step: Step) -> None:
        if isinstance(step, Convert):
            self._kind(step.x, step.columns, step.rows)
            self._steps(self._kind(step.out, step.columns, step.rows), *step.scale)
        elif isinstance(step, Norm):
            width = self.plan.width
            self._hold(self._kind(step.x, width, step.rows) == "bf16", "does not read bfloat16")
            self._whole(step.x, width)
            self._steps(self._kind(step.out, width, step.rows), *step.scale)
            self._rows(*step.shift, *step.gain)
        elif isinstance(step, Linear):
            self._linear(step)
        elif isinstance(step, Rope):
            self._rope(step)
        elif isinstance(step, Attention):
            kinds = (
                self._kind(step.x, 3 * self.plan.width, "all"),
                self._kind(step.out, self.plan.width, "all"),
            )
            self._hold(
                kinds in (("bf16", "bf16"), ("fp8", "fp8")), f"makes {kinds[1]} of {kinds[0]}"
            )
            self._whole(step.x, 3 * self.plan.width)
            self._steps(kinds[1], *step.scales, step.softmax_scale, step.out_scale)

    def order(self, step: Step, written: set[str]) -> None:
        """Nothing is read that no earlier step has written, and no input is written."""
        read = {step.x.buffer}
        made = {step.out.buffer}
        if isinstance(step, Linear):
            read |= made if step.epilogue == "residual" else set()
            made |= set() if step.second is None else {step.second.buffer}
        self._hold(read <= written, f"reads {', '.join(sorted(read))} before it is written")
        self._hold(not made & {"hidden_states", "context"}, "writes an input")
        written |= made

    def _linear(self, step: Linear) -> None:
        kind = self._kind(step.x, step.inner, step.rows)
        channels = step.columns * (2 if step.grouped else 1)
        self._hold(kind != "f32" and 0 < channels <= _MOST, f"has {channels} channels of {kind}")
        self._tensor(step.weight, kind, (channels, step.inner))
        self._tensor(step.bias, "f32", (channels,))
        self._hold((step.scale is None) == (kind == "bf16"), f"has the scale {step.scale}")
        if step.scale is not None:
            self._tensor(step.scale, "f32", (channels,))
        self._hold(not step.grouped or step.rows == "all", "has one stream, and weights for two")
        self._rows(*step.gate)
        if step.epilogue == "residual":
            self._hold(step.columns == self.plan.width, "is gated, and not as wide as the gates")
        if step.epilogue == "split":
            self._hold(0 < step.split < step.columns, f"is split at {step.split}")
        else:
            self._hold(step.split == 0 and step.second is None, "is split without need")
        first = self._kind(step.out, step.split or step.columns, step.rows)
        self._hold(first == "bf16" or step.epilogue == "gelu", f"writes {first}")
        last = first
        if step.epilogue == "split":
            self._hold(step.second is not None, "has no second output")
        if step.second is not None:
            last = self._kind(step.second, step.columns - step.split, step.rows)
        self._hold(last != "f32", "writes f32")
        self._steps(last, *step.out_scale)

    def _rope(self, step: Rope) -> None:
        columns = 3 * self.plan.width
        self._hold(self._kind(step.x, columns, "all") == "bf16", "does not read bfloat16")
        out = self._kind(step.out, columns, "all")
        self._hold(out == "fp8" or step.x == step.out, f"writes {out}")
        self._whole(step.x, columns)
        self._whole(step.out, columns)
        self._tensor(step.norms, "f32", (4, self.plan.head_dim))
        self._steps("fp8", step.softmax)
        self._steps(out, *step.scales)

    def _kind(self, place: Place, columns: int, rows: Rows) -> Kind:
        """What is at so many columns of a place."""
        buffer = self.buffers.get(place.buffer)
        if buffer is None:
            raise ValueError(f"{self.name} names the buffer {place.buffer!r}, which is not there")
        fits = columns > 0 and place.column >= 0 and place.column + columns <= buffer.columns
        where = f"columns {place.column} to {place.column + columns} of {buffer.name}"
        self._hold(fits, f"takes {where}, which has {buffer.columns}")
        self._hold(buffer.rows in ("all", rows), f"takes {rows} rows of {buffer.name}")
        return buffer.kind

    def _whole(self, place: Place, columns: int) -> None:
        """The kernel knows no other columns of the buffer."""
        whole = place.column == 0 and self.buffers[place.buffer].columns == columns
        self._hold(whole, f"takes a part of {place.buffer}")

    def _tensor(self, name: str, kind: Kind, shape: tuple[int, ...]) -> None:
        found = self.tensors.get(name)
        self._hold(found == (kind, shape), f"wants {name} of {kind} {shape}, and has {found}")

    def _rows(self, *rows: int) -> None:
        most = self.plan.modulation_rows
        self._hold(all(0 <= row < most for row in rows), f"takes rows {rows} of {most}")

    def _steps(self, kind: Kind, *scales: float) -> None:
        """Scales of numbers of a kind, of which 8 bits alone have any."""
        fits = all(0 < scale < math.inf and (kind == "fp8" or scale == 1) for scale in scales)
        self._hold(fits, f"has the scales {scales} for {kind}")

    def _hold(self, fits: bool, problem: str) -> None:
        _hold(fits, f"{self.name} {problem}")


def _hold(fits: bool, problem: str) -> None:
    if not fits:
        raise ValueError(problem)
