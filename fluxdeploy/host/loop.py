"""The one loop over the steps, whatever the task and the sampler."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engines.base import Array
from fluxdeploy.arguments import shown
from fluxdeploy.errors import NumericError, UsageError
from fluxdeploy.host.cancel import Checked
from fluxdeploy.host.finite import check_finite, is_finite
from fluxdeploy.host.numbers import as_float32
from fluxdeploy.sampling.sampler import Sampler, Velocity
from fluxdeploy.sampling.skipping import Extrapolated, Skips

__all__ = ["Blend", "StepCallback", "denoise"]

StepCallback = Callable[[int, NDArray[np.float32]], "NDArray[np.float32] | None"]
"""Called after each step with its index and the live latents; may return others to go on with."""

Blend = Callable[[int, NDArray[np.float32]], None]
"""Called after each step with its index and the latents, which it changes in place."""


def denoise(
    sampler: Sampler,
    latents: NDArray[np.float32],
    sigmas: NDArray[np.float32],
    velocity: Velocity,
    *,
    negative: Velocity | None = None,
    true_cfg_scale: float = 1.0,
    skips: Skips | None = None,
    blend: Blend | None = None,
    on_step_end: StepCallback | None = None,
    cancel: Checked | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> None:
    """Integrate dx/dsigma = v(x, sigma) from sigmas[0] to sigmas[-1], in place.

    latents: float32 [B, L, C], overwritten with the result. sigmas: float32 [N + 1].
    negative: true classifier-free guidance, v = v_neg + true_cfg_scale * (v - v_neg).
    skips: steps in which the velocity is extrapolated; the sampler takes one a step then.
    blend: comes before the check for finite numbers and the callback.
    interrupted: whether to leave it at the steps that were made.

    Beyond what `velocity` returns, the steps allocate nothing that grows with the picture. Raises
    `Cancelled` before a step where the token says so, and `NumericError` after one that left NaN
    or infinity.
    """
    steps = len(sigmas) - 1
    if negative is not None:
        velocity = _guided(velocity, negative, true_cfg_scale, np.empty_like(latents))
    if skips is not None:
        velocity = Extrapolated(velocity, sampler.levels(sigmas), skips)
    step = sampler.start(latents, sigmas)
    with np.errstate(over="ignore", invalid="ignore"):
        for index in range(steps):
            if interrupted is not None and interrupted():
                return
            if cancel is not None:
                cancel.check(f"after {index} of {steps} steps")
            step(index, velocity)
            if blend is not None:
                blend(index, latents)
            check_finite(latents, "transformer", index, steps)
            if on_step_end is not None:
                _take_over(latents, on_step_end(index, latents), index)


def _guided(
    positive: Velocity, negative: Velocity, scale: float, mixed: NDArray[np.float32]
) -> Velocity:
    """The velocity of true classifier-free guidance, written to `mixed` each time."""

    def velocity(level: int, latents: NDArray[np.float32]) -> Array:
        towards, away = positive(level, latents), negative(level, latents)
        np.subtract(towards, away, out=mixed)
        np.multiply(mixed, scale, out=mixed)
        np.add(away, mixed, out=mixed)
        return mixed

    return velocity


def _take_over(latents: NDArray[np.float32], replacement: object, step: int) -> None:
    """Go on with what the step callback returned, or left in `latents` itself."""
    if replacement is not None and replacement is not latents:
        others = as_float32(replacement)
        if others is None:
            raise UsageError(
                f"callback_on_step_end returned {shown(replacement)} as latents; they must be an "
                f"array of numbers {list(latents.shape)}."
            )
        if others.shape != latents.shape:
            raise UsageError(
                f"callback_on_step_end returned latents of shape {list(others.shape)}; "
                f"they must keep the shape {list(latents.shape)}."
            )
        np.copyto(latents, others)
    if not is_finite(latents):
        raise NumericError(
            f"callback_on_step_end left NaN or infinity in the latents at step {step + 1}. Check "
            "what it returns or changes."
        )
