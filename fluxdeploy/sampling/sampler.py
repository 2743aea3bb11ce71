"""What a sampler is: a module of this package that moves latents from one noise level to the next.

Its name is the module's, and nothing lists them: a new file is all that a new sampler takes.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

import fluxdeploy.sampling
from fluxdeploy.arguments import shown
from fluxdeploy.errors import UsageError

__all__ = ["Sampler", "Step", "Velocity", "load_sampler", "sampler_names"]


class Velocity(Protocol):
    """dx/dsigma of the latents at one of the sampler's `levels`, given by its index.

    The array returned is read before the next call only.
    """

    def __call__(self, level: int, latents: NDArray[np.float32]) -> NDArray[Any]: ...


Step = Callable[[int, Velocity], None]
"""`step(i, velocity)` takes the latents it was started with from sigmas[i] to sigmas[i + 1]."""


@runtime_checkable
class Sampler(Protocol):
    """The functions of a sampler's module; `sigmas` is float32 [N + 1], falling.

    Levels of a schedule may be equal where float32 cannot tell them apart: a step between two of
    them changes nothing.
    """

    def levels(self, sigmas: NDArray[np.float32]) -> NDArray[np.float32]:
        """All noise levels, float32 [E], at which the steps evaluate the velocity, none of them 0:
        models have not seen it. Where a step begins is among them."""

    def evaluations(self, steps: int) -> int:
        """How often so many steps evaluate the velocity, which is what they cost."""

    def start(self, latents: NDArray[np.float32], sigmas: NDArray[np.float32]) -> Step:
        """The step function, which changes `latents` in place; its buffers are made here, once."""


def sampler_names() -> tuple[str, ...]:
    """The samplers there are: Euler's first, which is the one where none is asked for."""
    modules = [module.name for module in pkgutil.iter_modules(fluxdeploy.sampling.__path__)]
    found = [name for name in modules if _load(name) is not None]
    return tuple(sorted(found, key=lambda name: (name != "euler", name)))


def load_sampler(name: str) -> Sampler:
    """The sampler of that name. Raises `UsageError` where there is none."""
    sampler = _load(name) if isinstance(name, str) and name.isidentifier() else None
    if sampler is None:
        names = ", ".join(map(repr, sampler_names()))
        raise UsageError(f"There is no sampler {shown(name)}. Use one of {names}.")
    return sampler


def _load(name: str) -> Sampler | None:
    with contextlib.suppress(ModuleNotFoundError):
        module = importlib.import_module(f"fluxdeploy.sampling.{name}")
        return module if isinstance(module, Sampler) else None
    return None
