"""Where the activations of a plan lie: buffers share memory where their times do not overlap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from engines.native.plan import BYTES, Buffer, Linear, Place, Plan, Step

__all__ = ["Layout", "buffer_bytes", "lay_out", "reads", "rows_of", "writes"]

_ALIGNMENT = 256


@dataclass(frozen=True)
class Layout:
    """Offsets of buffers by name, and the bytes of all of them together."""

    offsets: Mapping[str, int]
    size: int


def rows_of(buffer: Buffer, text: int, image: int) -> int:
    return {"text": text, "image": image, "all": text + image}[buffer.rows]


def buffer_bytes(buffer: Buffer, text: int, image: int) -> int:
    return rows_of(buffer, text, image) * buffer.columns * BYTES[buffer.kind]


def reads(step: Step) -> Iterator[Place]:
    """The places that a step reads."""
    yield step.x
    if isinstance(step, Linear) and step.epilogue == "residual":
        yield step.out


def writes(step: Step) -> Iterator[Place]:
    """The places that a step writes."""
    yield step.out
    if isinstance(step, Linear) and step.second is not None:
        yield step.second


def lay_out(plan: Plan, text: int, image: int) -> Layout:
    """Give each buffer a place, largest first, at the lowest offset that is free in its times.

    Inputs and outputs, which are f32, are not among them: they are the caller's.
    """
    times = _times(plan)
    placed: dict[str, tuple[int, int]] = {}
    inner = [b for b in plan.buffers if b.kind != "f32"]
    for buffer in sorted(inner, key=lambda b: -buffer_bytes(b, text, image)):
        size = -(-buffer_bytes(buffer, text, image) // _ALIGNMENT) * _ALIGNMENT
        taken = sorted(
            placed[other]
            for other in placed
            if _overlap(times.get(buffer.name, ()), times.get(other, ()))
        )
        offset = 0
        for start, end in taken:
            if start - offset >= size:
                break
            offset = max(offset, end)
        placed[buffer.name] = offset, offset + size
    size = max((end for _, end in placed.values()), default=0)
    return Layout({name: start for name, (start, _) in placed.items()}, size)


_Times = tuple[tuple[int, int], ...]


def _times(plan: Plan) -> dict[str, _Times]:
    """From which step to which a buffer holds something that is still read, again and again.

    A time begins with a write after all earlier writes were read, and ends with its last read.
    """
    found: dict[str, list[list[int]]] = {}
    was_read: dict[str, bool] = {}
    for index, step in enumerate(plan.steps):
        read = {place.buffer for place in reads(step)}
        written = {place.buffer for place in writes(step)}
        for name in read:
            if name in found:
                found[name][-1][1] = index
                was_read[name] = True
        for name in written - read:
            if name not in found or was_read[name]:
                found.setdefault(name, []).append([index, index])
                was_read[name] = False
        for name in written:
            found[name][-1][1] = index
        for name in written & read:
            was_read[name] = False
    return {name: tuple((a, b) for a, b in spans) for name, spans in found.items()}


def _overlap(one: _Times, other: _Times) -> bool:
    return any(a <= d and c <= b for a, b in one for c, d in other)
