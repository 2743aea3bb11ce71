"""The mean of the velocities at both ends of a step, level 0 too. Found by its name alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.sampling.sampler import Step, Velocity

__all__ = ["evaluations", "levels", "start"]


def levels(sigmas: NDArray[np.float32]) -> NDArray[np.float32]:
    return sigmas


def evaluations(steps: int) -> int:
    return 2 * steps


def start(latents: NDArray[np.float32], sigmas: NDArray[np.float32]) -> Step:
    first, ahead = np.empty_like(latents), np.empty_like(latents)

    def step(index: int, velocity: Velocity) -> None:
        length = sigmas[index + 1] - sigmas[index]
        np.multiply(velocity(index, latents), length, out=first)
        np.add(latents, first, out=ahead)
        np.multiply(velocity(index + 1, ahead), length, out=ahead)
        np.add(first, ahead, out=ahead)
        np.add(latents, ahead / 2, out=latents)

    return step
