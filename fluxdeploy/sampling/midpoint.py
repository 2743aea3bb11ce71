"""The midpoint method: a step goes along the velocity of its middle, of second order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.sampling.sampler import Step, Velocity

__all__ = ["evaluations", "levels", "start"]


def levels(sigmas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where each step begins, and its middle: [2N]."""
    middles = (sigmas[:-1] + sigmas[1:]) / np.float32(2)
    return np.stack([sigmas[:-1], middles], axis=1).reshape(-1)


def evaluations(steps: int) -> int:
    """Two a step."""
    return 2 * steps


def start(latents: NDArray[np.float32], sigmas: NDArray[np.float32]) -> Step:
    """A step that takes `latents` in place from sigmas[i] to sigmas[i + 1]."""
    middle = np.empty_like(latents)

    def step(index: int, velocity: Velocity) -> None:
        length = float(sigmas[index + 1]) - float(sigmas[index])
        np.multiply(velocity(2 * index, latents), length / 2, out=middle)
        np.add(latents, middle, out=middle)
        np.multiply(velocity(2 * index + 1, middle), length, out=middle)
        np.add(latents, middle, out=latents)

    return step
