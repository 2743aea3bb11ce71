"""The transformer as a velocity: bound to its prompts, with a task's channels and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.base import Array, Binding, Engine
from fluxdeploy.host.batches import divide
from fluxdeploy.host.cancel import Checked
from fluxdeploy.host.ip_adapter import Seen, zero_seen
from fluxdeploy.host.prompts import Condition
from fluxdeploy.host.residuals import zero_residuals

__all__ = ["Added", "HiddenStates", "ModulatedTransformer"]

Added = Callable[[int, NDArray[np.float32], slice], Mapping[str, Array]]
"""`added(level, latents, part)`: what ControlNets give for a part of the batch, by input."""


class HiddenStates:
    """What the transformer reads: the latents, with channels beside and tokens behind them.

    channels: float32 [B, L, C'], or None. tokens: float32 [B, R, C + C'], or None. The result is
    float32 [B, L + R, C + C'], in a buffer that is made once for latents of `shape` [B, L, C].
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: NDArray[np.float32] | None = None,
        tokens: NDArray[np.float32] | None = None,
    ) -> None:
        batch, length, width = shape
        self.tokens = length + (0 if tokens is None else tokens.shape[1])
        self._all: NDArray[np.float32] | None = None
        if channels is None and tokens is None:
            return
        beside = 0 if channels is None else channels.shape[2]
        behind = 0 if tokens is None else tokens.shape[1]
        self._all = np.empty((batch, length + behind, width + beside), np.float32)
        self._latents = self._all[:, :length, :width]
        if channels is not None:
            self._all[:, :length, width:] = channels
        if tokens is not None:
            self._all[:, length:] = tokens

    def around(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """The whole, with these latents; the latents themselves where there is nothing else."""
        if self._all is None:
            return latents
        np.copyto(self._latents, latents)
        return self._all


class ModulatedTransformer:
    """A `Velocity`: the `transformer` with all that no step changes in place.

    A batch that is larger than the engine takes is computed part by part, in buffers that serve
    every part: beyond the latents and their velocity, memory grows with a part alone.

    condition: what the prompts make of the transformer.
    fixed: its position tables, `rope_cos` and `rope_sin`, and what its side paths read.
    hidden: what it reads around the latents.
    cancel: ends a step between its parts.
    added: what ControlNets add inside it; None for zeros, where it takes any.
    seen: what it attends to of pictures; None for zeros, where it takes any.
    """

    def __init__(
        self,
        engine: Engine,
        condition: Condition,
        fixed: Mapping[str, Array],
        hidden: HiddenStates,
        cancel: Checked,
        added: Added | None = None,
        seen: Seen | None = None,
    ) -> None:
        self._added = added
        self._seen = seen
        self._condition = condition
        self._hidden = hidden
        self._cancel = cancel
        pictures = condition.pictures
        self._parts = [(part, pictures[part]) for part in divide(engine, len(pictures))]
        self._modulation, self._context = _Rows(), _Rows()
        # Two at most, since parts are as even as can be. Prompts stay in place where all of a
        # size's parts have the same ones; a binding for each part would take a batch's memory.
        self._bindings: dict[int, tuple[Binding, frozenset[str]]] = {}
        for size in {len(rows) for _, rows in self._parts}:
            parts = [part for part, rows in self._parts if len(rows) == size]
            resident: dict[str, Array] = {}
            if _same(pictures, parts):
                resident["context"] = condition.context[pictures[parts[0]]]
            if added is None:
                resident |= zero_residuals(engine, size, hidden.tokens)
            if seen is None:
                resident |= zero_seen(engine, size)
            elif _same(seen.pictures, parts):
                resident |= seen.of(parts[0])
            self._bindings[size] = engine.bind({**fixed, **resident}), frozenset(resident)
        self._velocity: Array | None = None

    def __call__(self, level: int, latents: NDArray[np.float32]) -> Array:
        states, length = self._hidden.around(latents), latents.shape[1]
        for part, rows in self._parts:
            if part.start > 0:
                self._cancel.check("in the middle of a step")
            more = {} if self._added is None else self._added(level, latents[part], part)
            velocity = self._run(level, states[part], part, rows, more)[:, :length]
            if len(self._parts) == 1:
                return velocity
            if self._velocity is None:
                self._velocity = np.empty((len(latents), *velocity.shape[1:]), velocity.dtype)
            self._velocity[part] = velocity
        assert self._velocity is not None  # there is a picture
        return self._velocity

    def _run(
        self,
        level: int,
        states: NDArray[np.float32],
        part: slice,
        rows: NDArray[np.intp],
        more: Mapping[str, Array],
    ) -> Array:
        binding, resident = self._bindings[len(rows)]
        modulation = self._condition.modulation[level]
        inputs = {
            "hidden_states": states,
            "modulation": self._modulation.take(modulation, rows),
            **more,
        }
        if "context" not in resident:
            inputs["context"] = self._context.take(self._condition.context, rows)
        if self._seen is not None and not self._seen.inputs.keys() <= resident:
            inputs |= self._seen.of(part)
        return binding.run(inputs)["velocity"]


def _same(pictures: NDArray[np.intp], parts: Sequence[slice]) -> bool:
    """Whether the parts of a batch, all of one size, have the same rows."""
    return all((pictures[part] == pictures[parts[0]]).all() for part in parts)


class _Rows:
    """Rows of arrays of one width, in a buffer that is made once.

    Without it, each step would allocate what a batch's prompts have: hundreds of MB.
    """

    def __init__(self) -> None:
        self._buffer: NDArray[np.float32] | None = None

    def take(self, values: NDArray[np.float32], rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """`values[rows]`: a view where they lie side by side, else until the next call."""
        side_by_side = slice(rows[0], rows[0] + len(rows))
        if (rows == np.arange(side_by_side.start, side_by_side.stop)).all():
            return values[side_by_side]
        if self._buffer is None or len(self._buffer) < len(rows):
            self._buffer = np.empty((len(rows), *values.shape[1:]), np.float32)
        # With mode="raise", np.take would buffer its output.
        return np.take(values, rows, axis=0, out=self._buffer[: len(rows)], mode="clip")
