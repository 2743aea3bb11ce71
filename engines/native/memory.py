"""Where the activations of a plan lie: buffers share memory where their times do not overlap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from engines.native.plan import BYTES, Buffer, Linear, Plan, Step
from engines.native.works import Launchable

__all__ = ["Layout", "lay_out"]

_ALIGNMENT = 256


@dataclass(frozen=True)
class Layout:
    """Offsets of buffers by name, and the bytes of all of them together."""

    offsets: Mapping[str, int]
    size: int


def _rows_of(buffer: Buffer, text: int, image: int) -> int:
    return {"text": text, "image": image, "all": text + image}[buffer.rows]


def _buffer_bytes(buffer: Buffer, text: int, image: int) -> int:
    return _rows_of(buffer, text, image) * buffer.columns * BYTES[buffer.kind]


def _reads(steps: Sequence[Step]) -> Iterator[str]:
    """The buffers that one launch reads."""
    yield steps[0].x.buffer
    if isinstance(steps[0], Linear) and steps[0].epilogue == "residual":
        yield steps[0].out.buffer


def _writes(steps: Sequence[Step]) -> Iterator[str]:
    """The buffers that one launch writes: of steps in a row, what the last of them makes."""
    yield steps[-1].out.buffer
    if isinstance(steps[0], Linear) and steps[0].second is not None:
        yield steps[0].second.buffer


def lay_out(plan: Plan, works: Sequence[Launchable], text: int, image: int) -> Layout:
    """Give each buffer a place, largest first, at the lowest offset that is free in its times.

    Inputs and outputs, which are f32, are not among them: they are the caller's. Nor are buffers
    that no launch touches, since what is in them is handed on within one.
    """
    times = _times(works)
    placed: dict[str, tuple[int, int]] = {}
    inner = [b for b in plan.buffers if b.kind != "f32" and b.name in times]
    for buffer in sorted(inner, key=lambda b: -_buffer_bytes(b, text, image)):
        size = -(-_buffer_bytes(buffer, text, image) // _ALIGNMENT) * _ALIGNMENT
        taken = sorted(
            placed[other] for other in placed if _overlap(times[buffer.name], times[other])
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


def _times(works: Sequence[Launchable]) -> dict[str, _Times]:
    """From which launch to which a buffer holds something that is still read, again and again.

    A time begins with a write after all earlier writes were read, and ends with its last read.
    """
    found: dict[str, list[list[int]]] = {}
    was_read: dict[str, bool] = {}
    for index, work in enumerate(works):
        read, written = set(_reads(work.steps)), set(_writes(work.steps))
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
