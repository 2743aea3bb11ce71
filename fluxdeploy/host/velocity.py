"""The transformer as a velocity: bound to its prompts, with a task's channels and tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.base import Array, Binding

__all__ = ["HiddenStates", "ModulatedTransformer"]


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
    """A `Velocity`: the `transformer` bound to one prompt per picture.

    binding: the engine with `context` and the RoPE tables in place.
    modulation: float32 [E, U, M, D], of the U distinct prompts at every noise level.
    rows: for each of the B pictures, the index of its prompt among the U.
    hidden: what the transformer reads around the latents.
    """

    def __init__(
        self,
        binding: Binding,
        modulation: NDArray[np.float32],
        rows: NDArray[np.intp],
        hidden: HiddenStates,
    ) -> None:
        self._binding = binding
        self._modulation = modulation
        self._rows = rows
        self._hidden = hidden
        # Where each picture has its own prompt, a level's modulation is what the transformer takes.
        # Else repeating all of it would cost E times this buffer: hundreds of MB.
        own = len(rows) == modulation.shape[1] and bool((rows == np.arange(len(rows))).all())
        self._level = None if own else np.empty((len(rows), *modulation.shape[2:]), np.float32)

    def __call__(self, level: int, latents: NDArray[np.float32]) -> Array:
        modulation = self._modulation[level]
        if self._level is not None:
            # With mode="raise", np.take would buffer its output.
            modulation = np.take(modulation, self._rows, axis=0, out=self._level, mode="clip")
        outputs = self._binding.run(
            {"hidden_states": self._hidden.around(latents), "modulation": modulation}
        )
        return outputs["velocity"][:, : latents.shape[1]]
