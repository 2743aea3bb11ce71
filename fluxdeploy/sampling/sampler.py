"""What a sampler is: a module of this package that moves latents from one noise level to the next.

Its name is the module's, and nothing lists them: a new file is all that a new sampler takes.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import shown
from fluxdeploy.errors import UsageError

__all__ = ["Sampler", "Step", "Velocity", "load_sampler"]


class Velocity(Protocol):
    """dx/dsigma of the latents at one of the sampler's `levels`, given by its index.

    The array returned is read before the next call only.
    """

    def __call__(self, level: int, latents: NDArray[np.float32]) -> NDArray[Any]: ...


Step = Callable[[int, Velocity], None]
"""`step(i, velocity)` takes the latents it was started with from sigmas[i] to sigmas[i + 1]."""


@runtime_checkable
class Sampler(Protocol):
    """The two functions of a sampler's module; `sigmas` is float32 [N + 1], falling."""

    def levels(self, sigmas: NDArray[np.float32]) -> NDArray[np.float32]:
        """All noise levels, float32 [E], at which the steps evaluate the velocity."""

    def start(self, latents: NDArray[np.float32], sigmas: NDArray[np.float32]) -> Step:
        """The step function, which changes `latents` in place; its buffers are made here, once."""


def load_sampler(name: str) -> Sampler:
    """The sampler of that name. Raises `UsageError` where there is none."""
    module = None
    if isinstance(name, str) and name.isidentifier():
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(f"fluxdeploy.sampling.{name}")
    if not isinstance(module, Sampler):
        raise UsageError(f"There is no sampler {shown(name)}. Use 'euler'.")
    return module
