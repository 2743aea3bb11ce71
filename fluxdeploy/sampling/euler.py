"""Euler's method along a rectified flow (arXiv 2209.03003): x += (sigma[i+1] - sigma[i]) * v."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.sampling.sampler import Step, Velocity

__all__ = ["evaluations", "levels", "start"]


def levels(sigmas: NDArray[np.float32]) -> NDArray[np.float32]:
    """The velocity is taken where a step begins: [N] of the [N + 1] levels."""
    return sigmas[:-1]


def evaluations(steps: int) -> int:
    """One a step."""
    return steps


def start(latents: NDArray[np.float32], sigmas: NDArray[np.float32]) -> Step:
    """A step that takes `latents` in place from sigmas[i] to sigmas[i + 1]."""
    change = np.empty_like(latents)

    def step(index: int, velocity: Velocity) -> None:
        np.multiply(velocity(index, latents), sigmas[index + 1] - sigmas[index], out=change)
        np.add(latents, change, out=latents)

    return step
