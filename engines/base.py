"""The contract: what a runtime says of itself to all others, and what its engines do for a host."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import check_integer
from fluxdeploy.bundle.manifest import (
    ComponentRecord,
    DimensionRange,
    EngineRecord,
    TensorSpec,
)
from fluxdeploy.errors import EngineError, UsageError
from fluxdeploy.kernels import AttentionKernels
from fluxdeploy.machine import usable_cpus
from fluxdeploy.precision import Precision
from fluxdeploy.progress import Progress

__all__ = [
    "CPU_SESSION",
    "Array",
    "Availability",
    "Binding",
    "BuildSettings",
    "Engine",
    "EngineOptions",
    "EngineSource",
    "Extra",
    "Runtime",
]

Array = NDArray[np.generic]
_Held = TypeVar("_Held")

_MAX_DEVICE = 2**31 - 1

CPU_SESSION = 2.5
"""Memory of a CPU session while it opens, as a multiple of its float32 weights: constants are
folded and packed while the originals are still there. A safe estimate."""


@dataclass(frozen=True)
class EngineOptions:
    """How to run an engine on this machine; nothing here changes its numbers.

    `threads` is the number of CPU threads (None: the runtime's own choice), at most the logical
    CPUs that this process may use; `device` the index of the GPU where the engine's target is one.
    Raises `UsageError` for anything else.
    """

    threads: int | None = None
    device: int = 0

    def __post_init__(self) -> None:
        if self.threads is not None:
            # Runtimes start as many as they are told to, and thousands take a machine's memory.
            unit = "(the logical CPUs that this process may use)"
            threads = check_integer("threads", self.threads, 1, usable_cpus(), unit)
            object.__setattr__(self, "threads", threads)
        object.__setattr__(self, "device", check_integer("device", self.device, 0, _MAX_DEVICE))


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
    not in it has no limit. `emulated` is whether it only has the numbers of its component's
    precision, and not its speed, see `Runtime.emulates`.
    """

    emulated = False

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
class Extra:
    """An extra of pyproject.toml: its name, what it is for in words, and the packages it brings."""

    name: str
    purpose: str
    packages: tuple[str, ...]


@dataclass(frozen=True)
class EngineSource:
    """What an engine is built from, and what it is asked to be.

    component, onnx, inputs: the component, its ONNX file, and the tensors that it takes.
    precision, compute: what is quantized, and the type of all the rest.
    quantized: how many linears are quantized as the precision says. attentions: how many softmaxes
        there are.
    one_head: whether attention has a single head as wide as the network, which no kernel fuses.
    weight_bytes: all weights, in the types that the graph has them in.
    weights_only: how many linears have their weights quantized alone for the sake of quality.
    wide_attentions: how many attentions are not quantized for that sake.
    """

    component: str
    precision: Precision
    compute: str
    onnx: Path
    inputs: tuple[TensorSpec, ...]
    quantized: int
    attentions: int
    one_head: bool
    weight_bytes: int
    weights_only: int = 0
    wide_attentions: int = 0


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built.

    `profiles` are the resolution buckets: each gives the sizes of every symbol of the inputs, and a
    tuned engine is best at each bucket's `opt`. `memory_limit` bounds the scratch memory of one
    kernel in bytes. With `weight_streaming` an engine may run with weights that do not all fit on
    the GPU. With `strict` what takes longer than was asked for, with numbers that are right, is an
    error: an attention that the runtime does not fuse, a quantized layer that it widens.
    """

    profiles: tuple[Mapping[str, DimensionRange], ...]
    memory_limit: int | None = None
    weight_streaming: bool = False
    strict: bool = False


class Runtime(ABC):
    """A runtime: all that others need to know of it, and how its engines are made and opened.

    name: what `--runtime` and manifests call it.
    targets: the kinds of device it knows, best first.
    distributions: the packages that hold it, of which one is enough.
    extra: what installs it, or its way to a GPU; None where the base has everything.
    builds: false where it opens ONNX files as they are, and there is nothing to build.
    tuned: whether its engines are built for a range of sizes, and best at one of them; others take
        any size.
    side_paths: whether its engines take LoRAs beside their weights, as inputs.
    shares_scratch: whether all open engines compute in one block of memory, by turns.
    joins: whether its transformers take what ControlNets and IP-Adapters give, as inputs.

    A precision is a row of `PRECISIONS` by its name. What a runtime does with one follows from the
    row's format and activations: a new row over a format that it knows needs no word here.
    """

    name: str
    targets: tuple[str, ...]
    distributions: tuple[str, ...]
    extra: Extra | None = None
    builds: bool = False
    tuned: bool = False
    side_paths: bool = False
    shares_scratch: bool = False
    joins: bool = True

    def version(self) -> str:
        """The installed version, empty where it is not installed. Imports nothing of it."""
        for distribution in self.distributions:
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
        return ""

    @abstractmethod
    def availability(self, target: str, device: int = 0) -> Availability:
        """Whether engines for `target` can run here, on the GPU of that index where it is one."""

    def can_build(self, target: str) -> Availability:
        """Whether engines for `target` can be built on this machine."""
        return Availability(True, "it opens ONNX files: there is nothing to build")

    def of(self, component: str, targets: tuple[str, ...]) -> tuple[Runtime, tuple[str, ...]]:
        """What runs a component of a bundle that is for `targets` of this runtime, and on which.

        Another runtime where this one has no engines for the component.
        """
        return self, targets

    def engines(self, component: str, record: ComponentRecord) -> Mapping[str, EngineRecord]:
        """What it can open of a bundle's component, by target."""
        return {e.target: e for e in record.engines if e.runtime == self.name}

    def precision(self, target: str, precision: str, component: str = "transformer") -> str:
        """The precision that a component really gets where `precision` is asked for."""
        return precision

    @abstractmethod
    def compute(self, target: str, precision: str) -> str:
        """The type that everything which `precision` does not quantize computes in."""

    def precision_problem(self, target: str, precision: str) -> str | None:
        """Why engines for `target` cannot have `precision`, or None where they can."""
        return None

    def checked_targets(self, source: EngineSource, targets: Sequence[str]) -> tuple[str, ...]:
        """Each of the targets of a build once.

        Raises `UsageError` where there is none, and for those that it has not, or not in the
        precision that is asked for.
        """
        unique = tuple(dict.fromkeys(targets))
        if not unique:
            raise UsageError(f"{self.name} needs a target; it has {', '.join(self.targets)}.")
        for target in unique:
            if target not in self.targets:
                raise UsageError(
                    f"{self.name} has no target {target!r}; its targets are "
                    f"{', '.join(self.targets)}."
                )
            if problem := self.precision_problem(target, source.precision.name):
                raise UsageError(
                    f"{source.component} cannot be {source.precision.name}: {problem}."
                )
        return unique

    def size_problem(self, width: int, head_dim: int) -> str | None:
        """Why engines cannot have a transformer of that width, with heads of that one."""
        return None

    def builder(self) -> str:
        """Name and version of what compiles its engines here, where that is another package."""
        return ""

    def emulates(self, target: str, precision: str) -> bool:
        """Whether engines only have the numbers of a precision there, and not its speed."""
        return False

    def widens_weights(self, target: str, precision: str) -> bool:
        """Whether quantized weights are in memory in the type that the rest computes in."""
        return False

    def attention(self, target: str, precision: str, compute: str) -> AttentionKernels:
        """What computes attention where a component has `precision` and the rest `compute`."""
        return AttentionKernels.PLAIN

    def opening_memory(self, target: str, weights: int) -> int:
        """Bytes of host memory that opening an engine takes, of `weights` bytes in float32.

        0 where nothing speaks against trying.
        """
        return int(CPU_SESSION * weights) if target == "cpu" else 0

    def building_memory(self, weights: int) -> int:
        """Bytes of host memory that a build takes, of `weights` bytes as the graph has them."""
        return 0

    def engine_size(self, weights: int) -> int:
        """Bytes of an engine's file at most, of `weights` bytes as the graph has them."""
        return 0

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
    ) -> tuple[Path, ...]:
        """Build one engine file at `destination` that serves every one of `targets`.

        Returns the files that were written: the engine, and what the runtime has to tell of it in
        files beside it. The engine is there whole or not at all; Ctrl-C stops the build. Raises
        `UsageError`, before any work, for targets, precisions and sizes that cannot be,
        `EngineError` where the runtime refuses and where the engine is not what `source` asks for,
        and `BundleError` where the disk refuses.
        """
        raise UsageError(f"{self.name} opens ONNX files as they are: there is nothing to build.")
