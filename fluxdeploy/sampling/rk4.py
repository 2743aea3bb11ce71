"""The classical Runge-Kutta method, of fourth order.

Its last step is Heun's of third order, which takes no velocity where the step ends: models have not
seen level 0. One step of third order leaves the whole at the fourth.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.sampling.sampler import Step, Velocity

__all__ = ["evaluations", "levels", "start"]


def levels(sigmas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where each step begins, and its middle; of the last, a third and two thirds: [2N + 1]."""
    middles = (sigmas[:-2] + sigmas[1:-1]) / np.float32(2)
    whole = np.stack([sigmas[:-2], middles], axis=1).reshape(-1)
    begin, end = sigmas[-2], sigmas[-1]
    last = [begin, begin + (end - begin) / np.float32(3), end - (end - begin) / np.float32(3)]
    return np.concatenate([whole, np.array(last, np.float32)])


def evaluations(steps: int) -> int:
    """Four a step, and three for the last."""
    return 4 * steps - 1


def start(latents: NDArray[np.float32], sigmas: NDArray[np.float32]) -> Step:
    """A step that takes `latents` in place from sigmas[i] to sigmas[i + 1]."""
    mean, ahead = np.empty_like(latents), np.empty_like(latents)
    scaled = np.empty_like(latents)

    def stage(velocity: Velocity, level: int, share: float, weight: float, length: float) -> None:
        """Add the velocity at `ahead` to the mean, and go a share of the step along it."""
        found = velocity(level, ahead)
        np.multiply(found, weight * length, out=scaled)
        np.add(mean, scaled, out=mean)
        np.multiply(found, share * length, out=scaled)
        np.add(latents, scaled, out=ahead)

    def step(index: int, velocity: Velocity) -> None:
        length = float(sigmas[index + 1]) - float(sigmas[index])
        last = index == len(sigmas) - 2
        np.copyto(ahead, latents)
        mean.fill(0)
        # Level after the first, share of the step to go next, weight in the mean.
        for level, share, weight in _LAST if last else _WHOLE:
            stage(velocity, 2 * index + level, share, weight, length)
        np.add(latents, mean, out=latents)

    return step


_WHOLE = ((0, 1 / 2, 1 / 6), (1, 1 / 2, 1 / 3), (1, 1.0, 1 / 3), (2, 0.0, 1 / 6))
_LAST = ((0, 1 / 3, 1 / 4), (1, 2 / 3, 0.0), (2, 0.0, 3 / 4))
