"""How a rectified flow noises a picture, and how far image to image goes back.

As in diffusers' FlowMatchEulerDiscreteScheduler (`scale_noise`) and FluxImg2ImgPipeline
(`get_timesteps`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["first_step", "scale_noise"]


def scale_noise(
    latents: NDArray[np.float32], noise: NDArray[np.float32], sigma: np.float32
) -> NDArray[np.float32]:
    """A picture's latents at noise level `sigma`: sigma * noise + (1 - sigma) * latents."""
    return sigma * noise + (np.float32(1) - sigma) * latents


def first_step(num_inference_steps: int, strength: float) -> int:
    """The step of the schedule that image to image begins with; strength is 0 to 1.

    All N steps are made at strength 1, none at 0, and else N * strength of them, rounded up.
    """
    kept = min(num_inference_steps * strength, num_inference_steps)
    return int(max(num_inference_steps - kept, 0))
