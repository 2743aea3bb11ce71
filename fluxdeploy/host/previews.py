"""Pictures of a running call: what it would end with, as far as its latest step can tell."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Previews", "Show", "preview_steps"]

_FIRST, _LAST = 0.2, 0.8
"""The share of the steps after which the first preview is shown, and before which the last."""

Show = Callable[[int, NDArray[np.float32]], None]
"""Called with the number of steps made, and pictures, float32 [B, H, W, 3] in 0..1."""


def preview_steps(count: int, steps: int) -> tuple[int, ...]:
    """After how many of the steps to show `count` previews: evenly from a fifth of them on.

    Fewer where there are fewer steps: after the last one the picture itself is there.
    """
    found: list[int] = []
    for index in range(count):
        wanted = int(steps * (_FIRST + (_LAST - _FIRST) * index / count))
        after = max(wanted, found[-1] + 1 if found else 1)
        if after < steps:
            found.append(after)
    return tuple(found)


class Previews:
    """Shows where a call is going.

    A step goes along the velocity: v = (x' - x) / (s' - s), from latents x at noise level s to x'
    at s'. The picture that it points at is where that line meets level 0: x' - s' v.

    steps: after how many steps to show one. sigmas: float32 [N + 1], the levels of the steps.
    decode: pictures of packed latents [B, L, C]. show: is given them.
    """

    def __init__(
        self,
        steps: tuple[int, ...],
        sigmas: NDArray[np.float32],
        decode: Callable[[NDArray[np.float32]], NDArray[np.float32]],
        show: Show,
    ) -> None:
        self._steps = steps
        self._sigmas = sigmas
        self._decode = decode
        self._show = show
        self._before: NDArray[np.float32] | None = None

    def before_step(self, step: int, latents: NDArray[np.float32]) -> None:
        """Remember the latents, [B, L, C], that a step begins with."""
        self._before = latents.copy() if step + 1 in self._steps else None

    def after_step(self, step: int, latents: NDArray[np.float32]) -> None:
        """Look at the latents that the step has made of them."""
        if self._before is not None:
            before, level = self._sigmas[step], self._sigmas[step + 1]
            way = float(level - before)
            # Levels near noise can be equal in float32: such a step goes nowhere.
            velocity = (latents - self._before) / way if way else 0.0
            self._show(step + 1, self._decode(latents - level * velocity))
