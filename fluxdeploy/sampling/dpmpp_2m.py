"""DPM-Solver++(2M) for rectified flows: one evaluation a step.

Algorithm 2 of Lu et al. (arXiv 2211.01095) with alpha = 1 - sigma, as in diffusers'
DPMSolverMultistepScheduler with `use_flow_sigmas`: what is taken to go on as it did is not the
velocity but the picture that it points at, x - sigma * v, over lambda = log(alpha / sigma). First
and last step are of first order, and so is the second where the first began at level 1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.sampling.euler import evaluations, levels
from fluxdeploy.sampling.sampler import Step, Velocity

__all__ = ["evaluations", "levels", "start"]


def start(latents: NDArray[np.float32], sigmas: NDArray[np.float32]) -> Step:
    """A step that takes `latents` in place from sigmas[i] to sigmas[i + 1]."""
    picture, before = np.empty_like(latents), np.empty_like(latents)
    change = np.empty_like(latents)

    def step(index: int, velocity: Velocity) -> None:
        sigma, after = float(sigmas[index]), float(sigmas[index + 1])
        np.multiply(velocity(index, latents), sigma, out=picture)
        np.subtract(latents, picture, out=picture)
        np.multiply(latents, after / sigma, out=latents)
        # alpha' - alpha * sigma' / sigma = -alpha' * (exp(lambda - lambda') - 1), also at level 1.
        weight = (1 - after) - (1 - sigma) * after / sigma
        lean = _lean(sigmas, index)
        np.multiply(picture, (1 + lean) * weight, out=change)
        np.add(latents, change, out=latents)
        if lean:
            np.multiply(before, lean * weight, out=before)
            np.subtract(latents, before, out=latents)
        np.copyto(before, picture)

    return step


def _lean(sigmas: NDArray[np.float32], index: int) -> float:
    """How much of the last change of the picture the next half step adds: h / (2 h_before)."""
    if not 0 < index < len(sigmas) - 2:
        return 0.0
    earlier, now, after = (_log_ratio(float(s)) for s in sigmas[index - 1 : index + 2])
    return (after - now) / (2 * (now - earlier)) if now > earlier > -math.inf else 0.0


def _log_ratio(sigma: float) -> float:
    """lambda: the logarithm of the share of picture over that of noise."""
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1 else -math.inf
