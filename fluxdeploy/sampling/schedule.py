"""The noise levels of a rectified flow, as diffusers computes them for FLUX.1.

Time-shifting follows section 5.3.2 of Stable Diffusion 3's paper (arXiv 2403.03206): larger
pictures need more steps at high noise. The arithmetic is float32 in the order that diffusers'
FlowMatchEulerDiscreteScheduler uses, so that the levels are bit-equal; spacings are computed in
float64, as there.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import check_integer
from fluxdeploy.bundle.manifest import ScheduleSpec
from fluxdeploy.errors import UsageError
from fluxdeploy.sampling.spacing import spaced

__all__ = ["MAX_STEPS", "even_levels", "shift_exponent", "sigmas"]

MAX_STEPS = 1_000_000
"""More than any machine makes, and few enough for memory to hold their levels."""

_MAX_EXPONENT = 80
"""A float32 holds e to this power, and its inverse."""

_MAX_SHIFT = 1e30


def shift_exponent(spec: ScheduleSpec, image_tokens: int) -> float:
    """mu, linear in the number of image tokens: base_shift to max_shift between the two sizes."""
    slope = (spec.max_shift - spec.base_shift) / (spec.max_image_seq_len - spec.base_image_seq_len)
    offset = spec.base_shift - slope * spec.base_image_seq_len
    return image_tokens * slope + offset


def even_levels(num_inference_steps: int) -> NDArray[np.float32]:
    """What is shifted, float32 [N]: from 1 to 1/N, in even steps.

    Raises `UsageError` for a number that is none of steps.
    """
    steps = check_integer("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
    return np.linspace(1.0, 1 / steps, steps).astype(np.float32)


def sigmas(
    spec: ScheduleSpec, levels: int | NDArray[np.float32], image_tokens: int
) -> NDArray[np.float32]:
    """Noise levels, float32 [N + 1]: from 1 (all noise) down to 0 (the picture).

    levels: the number of steps, or what is shifted in place of `even_levels`, float32 [N], falling.

    Step i goes from level i to level i + 1, and level i is the model's timestep in 0..1. Raises
    `UsageError` for numbers of steps and tokens that make no levels.
    """
    if not isinstance(levels, np.ndarray):
        levels = even_levels(levels)
    image_tokens = check_integer("image_tokens", image_tokens, 1)
    if spec.use_dynamic_shifting:
        levels = _shift_by_size(levels, spec.time_shift_type, shift_exponent(spec, image_tokens))
    else:
        levels = spec.shift * levels / (1 + (spec.shift - 1) * levels)
    # Like diffusers, 0 means no stretching.
    if spec.shift_terminal:
        levels = _stretch(levels, spec.shift_terminal)
    if spec.spacing is not None:
        levels = spaced(spec.spacing, levels)
    return np.append(levels, np.float32(0.0))


def _shift_by_size(levels: NDArray[np.float32], kind: str, mu: float) -> NDArray[np.float32]:
    possible = abs(mu) <= _MAX_EXPONENT if kind == "exponential" else 0 < mu <= _MAX_SHIFT
    if not possible:
        raise UsageError(
            "This bundle's schedule makes no noise levels for a picture of this size: its shift "
            f"would be {mu:g}. Ask for a size nearer to the bundle's default."
        )
    factor = np.float32(math.exp(mu) if kind == "exponential" else mu)
    one = np.float32(1)
    shifted: NDArray[np.float32] = factor / (factor + (one / levels - one))
    if len(levels) > 1 and shifted[-1] == 1:
        raise UsageError(
            f"This bundle's schedule makes no noise levels for a picture of this size: with a "
            f"shift of {mu:g} all of the {len(levels)} levels are 1. Ask for a size nearer to the "
            "bundle's default."
        )
    return shifted


def _stretch(levels: NDArray[np.float32], terminal: float) -> NDArray[np.float32]:
    """Stretch the levels, seen from 1, so that the last one before 0 is `terminal`."""
    progress = 1 - levels
    if progress[-1] == 0:
        raise UsageError(
            "This bundle's schedule stretches to a terminal level, which one step cannot reach: "
            "num_inference_steps must be at least 2."
        )
    # Both float32: NumPy 1 would otherwise make this scalar a double.
    scale = progress[-1] / np.float32(1 - terminal)
    stretched: NDArray[np.float32] = 1 - progress / scale
    return stretched
