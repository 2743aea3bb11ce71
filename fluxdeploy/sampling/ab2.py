"""The Adams-Bashforth method of second order, for steps of any lengths: one evaluation a step.

The velocity is taken to go on as it did from the step before; the first step is Euler's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.sampling.euler import evaluations, levels
from fluxdeploy.sampling.sampler import Step, Velocity

__all__ = ["evaluations", "levels", "start"]


def start(latents: NDArray[np.float32], sigmas: NDArray[np.float32]) -> Step:
    """A step that takes `latents` in place from sigmas[i] to sigmas[i + 1]."""
    before, change = np.empty_like(latents), np.empty_like(latents)

    def step(index: int, velocity: Velocity) -> None:
        length = float(sigmas[index + 1]) - float(sigmas[index])
        found = velocity(index, latents)
        earlier = float(sigmas[index]) - float(sigmas[index - 1]) if index > 0 else 0.0
        lean = length / (2 * earlier) if earlier else 0.0
        np.multiply(found, (1 + lean) * length, out=change)
        if lean:
            np.multiply(before, lean * length, out=before)
            np.subtract(change, before, out=change)
        np.copyto(before, found)
        np.add(latents, change, out=latents)

    return step
