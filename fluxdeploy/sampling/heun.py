"""Heun's method: the mean of the velocities at both ends of a step, of second order.

As in diffusers' FlowMatchHeunDiscreteScheduler and in algorithm 1 of Karras et al. (arXiv
2206.00364), the last step is Euler's: models have not seen level 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.sampling.sampler import Step, Velocity

__all__ = ["evaluations", "levels", "start"]


def levels(sigmas: NDArray[np.float32]) -> NDArray[np.float32]:
    """The velocity is taken at the ends of steps, but for the last: [N] of the [N + 1] levels."""
    return sigmas[:-1]


def evaluations(steps: int) -> int:
    """Two a step, and one for the last."""
    return 2 * steps - 1


def start(latents: NDArray[np.float32], sigmas: NDArray[np.float32]) -> Step:
    """A step that takes `latents` in place from sigmas[i] to sigmas[i + 1]."""
    change, ahead = np.empty_like(latents), np.empty_like(latents)

    def step(index: int, velocity: Velocity) -> None:
        length = float(sigmas[index + 1]) - float(sigmas[index])
        np.multiply(velocity(index, latents), length, out=change)
        if index < len(sigmas) - 2:
            np.add(latents, change, out=ahead)
            np.multiply(velocity(index + 1, ahead), length, out=ahead)
            np.add(change, ahead, out=change)
            np.multiply(change, 0.5, out=change)
        np.add(latents, change, out=latents)

    return step
