"""What every runtime's engine looks like to a host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.manifest import (
    ComponentRecord,
    DimensionRange,
    EngineRecord,
    TensorSpec,
)

Array = NDArray[np.generic]


@dataclass(frozen=True)
class EngineOptions:
    """How to run an engine on this machine; nothing here changes its numbers.

    `threads` is the number of CPU threads (None: the runtime's own choice), `device` the index of
    the GPU where the engine's target is one.
    """

    threads: int | None = None
    device: int = 0


class Binding(ABC):
    """An engine with some inputs already in place, for a loop that calls it many times."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run once with the inputs that change.

        Returns the outputs by name, as host arrays that belong to the binding: the next call
        overwrites them. Raises `EngineError` for a missing, unknown or misshapen tensor.
        """


class Engine(ABC):
    """An opened component. A context manager; `close` frees its memory.

    `dimensions` gives the sizes accepted for each symbol of the tensors' shapes; a symbol that is
    not in it has no limit.
    """

    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimensions: Mapping[str, DimensionRange]

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; the returned arrays belong to the caller.

        Raises `EngineError` for a missing, unknown or misshapen tensor.
        """

    @abstractmethod
    def bind(self, resident: Mapping[str, Array]) -> Binding:
        """Place the inputs that stay the same between calls on the engine's device, once.

        They are copied: changing an array afterwards changes nothing. Raises `EngineError` for
        an unknown or misshapen tensor.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the engine. Calling it twice is harmless."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Availability:
    """Whether a runtime can run engines for a target on this machine, and why (not)."""

    ok: bool
    detail: str


class Runtime(ABC):
    """A runtime: what it can run here, and how its engines are opened.

    `targets` are the kinds of device it knows, best first.
    """

    name: str
    targets: tuple[str, ...]

    @abstractmethod
    def version(self) -> str:
        """The installed version, empty where it is not installed. Imports nothing heavy."""

    @abstractmethod
    def availability(self, target: str) -> Availability:
        """Whether engines for `target` can run on this machine."""

    @abstractmethod
    def precision(self, target: str, precision: str) -> str:
        """The precision that a component really computes in where `precision` is asked for."""

    @abstractmethod
    def open(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        root: Path,
        options: EngineOptions,
    ) -> Engine:
        """Open one engine of a bundle at `root`.

        Raises `EngineError` where the file is broken or does not fit this machine, and
        `MissingDependencyError` where the runtime is not installed.
        """
