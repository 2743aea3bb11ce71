"""Pictures of a running call: what it would end with, as far as its latest step can tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.manifest import LatentSpec, Manifest, PreviewSpec
from fluxdeploy.errors import UsageError
from fluxdeploy.sampling.latents import unpack

__all__ = ["Previews", "Show", "Wanted", "linear_pictures", "preview_steps", "require_linear"]

_FIRST, _LAST = 0.2, 0.8
"""The share of the steps after which the first preview is shown, and before which the last."""

Show = Callable[[int, NDArray[np.float32]], None]
"""Called with the number of steps made, and pictures, float32 [B, H, W, 3] in 0..1."""


@dataclass(frozen=True)
class Wanted:
    """Which previews to make, and who is given them.

    linear: the map that makes them of the latents, after every step, one pixel for each latent.
    Where it is None the VAE's decoder makes `count` of them, in full size.
    """

    count: int
    linear: PreviewSpec | None
    show: Show

    def after(self, steps: int) -> tuple[int, ...]:
        """After how many of the steps to show one."""
        if self.linear is None:
            return preview_steps(self.count, steps)
        return tuple(range(1, steps + 1))


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


def require_linear(manifest: Manifest) -> PreviewSpec:
    """The bundle's map from latents to colours. Raises `UsageError` where an old one has none."""
    if manifest.preview is None:
        raise UsageError(
            "This bundle has no map from latents to colours, which previews of each step take. "
            "Build it again with `fluxdeploy build`, or have the VAE decode previews."
        )
    return manifest.preview


def linear_pictures(
    tokens: NDArray[np.float32], height: int, width: int, spec: LatentSpec, linear: PreviewSpec
) -> NDArray[np.float32]:
    """Pictures of packed latents [B, L, C] by a linear map: float32 [B, h, w, 3] in 0..1."""
    latents = unpack(tokens, height, width, spec)
    batch, channels, rows, columns = latents.shape
    matrix = np.asarray(linear.matrix, np.float32)
    colours = matrix.T @ latents.reshape(batch, channels, rows * columns)
    colours += np.asarray(linear.bias, np.float32)[:, None]
    np.clip(colours, 0.0, 1.0, out=colours)
    return np.ascontiguousarray(colours.transpose(0, 2, 1)).reshape(batch, rows, columns, 3)


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
