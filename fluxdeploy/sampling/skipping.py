"""Steps without the transformer: their velocity is extrapolated from those before.

Along a trajectory the velocity changes little from step to step, so that a polynomial in sigma
through its last values, a parabola at most, tells the next ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.sampling.sampler import Velocity

__all__ = ["Extrapolated", "Skips", "extrapolation"]


@dataclass(frozen=True)
class Skips:
    """Which steps of a schedule take no velocity of their own, counted from 0.

    order: the degree of the polynomial: 0 holds the last value, 1 is a line, 2 a parabola. A step
    with fewer values before it takes a lower one, and one with none is not skipped.
    """

    steps: tuple[int, ...]
    order: int = 1

    def after(self, first: int) -> Skips:
        """The same, counted from the step `first` on, with which a call begins."""
        return Skips(tuple(step - first for step in self.steps if step > first), self.order)


def extrapolation(known: Sequence[float], sigma: float) -> list[float]:
    """What the values at the levels `known` weigh in the polynomial through them, at `sigma`."""
    weights = []
    for j, own in enumerate(known):
        weight = 1.0
        for m, other in enumerate(known):
            if m != j:
                weight *= (sigma - other) / (own - other)
        weights.append(weight)
    return weights


class Extrapolated:
    """A `Velocity` that asks another one only at levels that are not skipped.

    levels: float32 [E], the sampler's, of which it takes one a step.
    """

    def __init__(self, velocity: Velocity, levels: NDArray[np.float32], skips: Skips) -> None:
        self._velocity = velocity
        self._levels = levels
        self._skipped = frozenset(skips.steps)
        self._most = skips.order + 1
        # The latest last.
        self._known: list[tuple[float, NDArray[np.float32]]] = []
        self._sum: NDArray[np.float32] | None = None
        self._part: NDArray[np.float32] | None = None

    def __call__(self, level: int, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        sigma = float(self._levels[level])
        if level in self._skipped and self._known:
            return self._guess(sigma)
        found = self._velocity(level, latents)
        if self._known and self._known[-1][0] == sigma:
            kept = self._known.pop()[1]
        elif len(self._known) == self._most:
            kept = self._known.pop(0)[1]
        else:
            kept = np.empty_like(latents)
        np.copyto(kept, found)
        self._known.append((sigma, kept))
        return kept

    def _guess(self, sigma: float) -> NDArray[np.float32]:
        if self._sum is None or self._part is None:
            self._sum, self._part = (np.empty_like(self._known[0][1]) for _ in range(2))
        self._sum.fill(0)
        weights = extrapolation([level for level, _ in self._known], sigma)
        for weight, (_, values) in zip(weights, self._known, strict=True):
            np.multiply(values, weight, out=self._part)
            np.add(self._sum, self._part, out=self._sum)
        return self._sum
