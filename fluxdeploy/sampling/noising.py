"""How a rectified flow noises a picture, and how far image to image goes back.

As in diffusers' FlowMatchEulerDiscreteScheduler (`scale_noise`) and FluxImg2ImgPipeline
(`get_timesteps`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import check_integer, check_number
from fluxdeploy.sampling.schedule import MAX_STEPS

__all__ = ["first_step", "scale_noise"]


def scale_noise(
    latents: NDArray[np.float32], noise: NDArray[np.float32], sigma: np.float32
) -> NDArray[np.float32]:
    """A picture's latents at noise level `sigma`: sigma * noise + (1 - sigma) * latents."""
    return sigma * noise + (np.float32(1) - sigma) * latents


def first_step(num_inference_steps: int, strength: float) -> int:
    """The step of the schedule that image to image begins with; strength is 0 to 1.

    All N steps are made at strength 1, none at 0, and else N * strength of them, rounded up. Raises
    `UsageError` for numbers that are no steps and no strength.
    """
    steps = check_integer("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
    strength = check_number("strength", strength, 0, 1)
    return int(steps - min(steps * strength, steps))
