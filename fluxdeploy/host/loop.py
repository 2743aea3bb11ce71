"""The sampling loop: Euler steps along a rectified flow, with true classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.base import Array, Binding
from fluxdeploy.errors import Cancelled, NumericError, UsageError

__all__ = ["ModulatedTransformer", "StepCallback", "Velocity", "check_finite", "sample_euler"]

StepCallback = Callable[[int, NDArray[np.float32]], "NDArray[np.float32] | None"]
"""Called after each step with its index and the live latents; may return others to go on with."""


class Velocity(Protocol):
    """dx/dsigma of the latents. The array returned is read before the next call only."""

    def __call__(self, step: int, latents: NDArray[np.float32]) -> Array: ...


class ModulatedTransformer:
    """A `Velocity`: the `transformer` bound to one prompt per picture.

    binding: the engine with `context` and the RoPE tables in place.
    modulation: float32 [N, U, M, D], of the U distinct prompts at every timestep.
    rows: for each of the B pictures, the index of its prompt among the U.
    """

    def __init__(
        self, binding: Binding, modulation: NDArray[np.float32], rows: NDArray[np.intp]
    ) -> None:
        self._binding = binding
        self._modulation = modulation
        self._rows = rows
        # Where each picture has its own prompt, a step's modulation is what the transformer takes.
        # Else repeating all of it would cost N times this buffer: hundreds of MB.
        own = len(rows) == modulation.shape[1] and bool((rows == np.arange(len(rows))).all())
        self._step = None if own else np.empty((len(rows), *modulation.shape[2:]), np.float32)

    def __call__(self, step: int, latents: NDArray[np.float32]) -> Array:
        modulation = self._modulation[step]
        if self._step is not None:
            # With mode="raise", np.take would buffer its output.
            modulation = np.take(modulation, self._rows, axis=0, out=self._step, mode="clip")
        outputs = self._binding.run({"hidden_states": latents, "modulation": modulation})
        return outputs["velocity"]


def sample_euler(
    latents: NDArray[np.float32],
    sigmas: NDArray[np.float32],
    velocity: Velocity,
    *,
    negative: Velocity | None = None,
    true_cfg_scale: float = 1.0,
    on_step_end: StepCallback | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> None:
    """Integrate dx/dsigma = v(x, sigma) from sigmas[0] to sigmas[-1], in place.

    Euler's method on a rectified flow (arXiv 2209.03003): x += (sigma[i+1] - sigma[i]) * v. With
    `negative`, v = v_neg + true_cfg_scale * (v - v_neg).

    latents: float32 [B, L, C], overwritten with the result. sigmas: float32 [N + 1].

    Beyond what `velocity` returns, the loop allocates nothing. Raises `Cancelled` before a step
    where `interrupted()` says so, and `NumericError` after one that left NaN or infinity.
    """
    steps = len(sigmas) - 1
    change = np.empty_like(latents)
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(steps):
            if interrupted():
                raise Cancelled(f"Interrupted after {step} of {steps} steps; no picture was made.")
            if negative is None:
                np.multiply(velocity(step, latents), sigmas[step + 1] - sigmas[step], out=change)
            else:
                positive_velocity = velocity(step, latents)
                negative_velocity = negative(step, latents)
                np.subtract(positive_velocity, negative_velocity, out=change)
                np.multiply(change, true_cfg_scale, out=change)
                np.add(negative_velocity, change, out=change)
                np.multiply(change, sigmas[step + 1] - sigmas[step], out=change)
            np.add(latents, change, out=latents)
            check_finite(latents, "transformer", step, steps)
            if on_step_end is not None:
                _take_over(latents, on_step_end(step, latents), step)


def check_finite(
    values: Array, component: str, step: int | None = None, steps: int | None = None
) -> None:
    """Raise `NumericError`, naming the component and the step, where a value is NaN or infinite."""
    if _is_finite(values):
        return
    where = "" if step is None else f" at step {step + 1} of {steps}"
    raise NumericError(
        f"The {component} gave NaN or infinity{where}. Use a bundle in a wider precision (bf16 or "
        "fp32), or run `fluxdeploy verify` to see which component is off."
    )


def _is_finite(values: Array) -> bool:
    """Whether all values are finite, without allocating.

    The extremes tell: both carry NaN along, and, unlike a sum, neither overflows.
    """
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(values.min()) and np.isfinite(values.max()))


def _take_over(
    latents: NDArray[np.float32], replacement: NDArray[np.float32] | None, step: int
) -> None:
    """Go on with what the step callback returned, or left in `latents` itself."""
    if replacement is not None and replacement is not latents:
        if np.shape(replacement) != latents.shape:
            raise UsageError(
                f"callback_on_step_end returned latents of shape {list(np.shape(replacement))}; "
                f"they must keep the shape {list(latents.shape)}."
            )
        np.copyto(latents, replacement, casting="same_kind")
    if not _is_finite(latents):
        raise NumericError(
            f"callback_on_step_end left NaN or infinity in the latents at step {step + 1}. Check "
            "what it returns or changes."
        )
