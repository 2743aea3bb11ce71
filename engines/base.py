"""What every runtime's engine looks like to a host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.manifest import (
    ComponentRecord,
    DimensionRange,
    EngineRecord,
    TensorSpec,
)
from fluxdeploy.errors import EngineError, UsageError

if TYPE_CHECKING:
    from engines.tensorrt.fusion import FusionReport
    from fluxdeploy.progress import Progress

Array = NDArray[np.generic]
_Held = TypeVar("_Held")


@dataclass(frozen=True)
class EngineOptions:
    """How to run an engine on this machine; nothing here changes its numbers.

    `threads` is the number of CPU threads (None: the runtime's own choice), `device` the index of
    the GPU where the engine's target is one. With `cuda_graphs` a TensorRT engine records its work
    once for each exact shape and replays it.
    """

    threads: int | None = None
    device: int = 0
    cuda_graphs: bool = False


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

    def __init__(
        self,
        component: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        dimensions: Mapping[str, DimensionRange],
    ) -> None:
        self.component = component
        self.inputs = inputs
        self.outputs = outputs
        self.dimensions = dimensions

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

    def _while_open(self, held: _Held | None) -> _Held:
        """What the engine runs with. Raises `EngineError` for None, which closing leaves."""
        if held is None:
            raise EngineError(f"{self.component}: the engine was closed.")
        return held

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Availability:
    """Whether a runtime can run, or build, engines for a target on this machine; why (not)."""

    ok: bool
    detail: str


@dataclass(frozen=True)
class EngineSource:
    """What an engine is built from: the ONNX file of a component, and its inputs."""

    component: str
    precision: str
    onnx: Path
    inputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built.

    `profiles` are the resolution buckets: each gives the sizes of every symbol of the inputs, and
    the engine is tuned for each bucket's `opt`. `memory_limit` bounds the scratch memory of one
    kernel in bytes. With `weight_streaming` an engine may run with weights that do not all fit on
    the GPU. `timing_cache` is a file that keeps what was measured for the next build; runtimes
    that measure nothing leave it alone.
    """

    profiles: tuple[Mapping[str, DimensionRange], ...]
    memory_limit: int | None = None
    weight_streaming: bool = False
    timing_cache: Path | None = None


@dataclass(frozen=True)
class BuildReport:
    """What a build gave: the engine file's size in bytes, the time it took, and its kernels."""

    engine_bytes: int
    seconds: float
    fusion: FusionReport


class Runtime(ABC):
    """A runtime: what it can run here, and how its engines are opened.

    `targets` are the kinds of device it knows, best first. Where `builds` is false it opens ONNX
    files as they are, and there is nothing to build.
    """

    name: str
    targets: tuple[str, ...]
    builds: bool = False

    @abstractmethod
    def version(self) -> str:
        """The installed version, empty where it is not installed. Imports nothing heavy."""

    @abstractmethod
    def availability(self, target: str) -> Availability:
        """Whether engines for `target` can run on this machine."""

    def can_build(self, target: str) -> Availability:
        """Whether engines for `target` can be built on this machine."""
        return Availability(True, "it opens ONNX files: there is nothing to build")

    @abstractmethod
    def precision(self, target: str, precision: str) -> str:
        """The precision that a component really gets where `precision` is asked for."""

    @abstractmethod
    def compute(self, target: str, precision: str) -> str:
        """The type that everything which `precision` does not quantize computes in."""

    def fuses_attention(self, target: str, compute: str) -> bool:
        """Whether attention computing in `compute` is ONNX Runtime's own operator."""
        return False

    def precision_problem(self, target: str, precision: str) -> str | None:
        """Why engines for `target` cannot have `precision`, or None where they can."""
        return None

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

    def build(
        self,
        source: EngineSource,
        targets: Sequence[str],
        settings: BuildSettings,
        destination: Path,
        progress: Progress,
    ) -> BuildReport:
        """Build one engine file at `destination` that serves every one of `targets`.

        The file is there whole or not at all; Ctrl-C stops the build. Raises `UsageError`, before
        any work, for targets, precisions and sizes that cannot be, `EngineError` where the runtime
        refuses, and `BundleError` where the disk does.
        """
        raise UsageError(f"{self.name} opens ONNX files as they are: there is nothing to build.")
