"""What a plan says: figures, and words for what cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fluxdeploy.errors import BundleError, UsageError
from fluxdeploy.kernels import CallSizes

__all__ = ["Beside", "ComponentPlan", "DiskPlan", "Phase", "Plan", "RunMemory"]


@dataclass(frozen=True)
class Beside:
    """What a bundle holds beside the edition that is planned.

    files: the checkpoint's files that it has in any case. taken: bytes of the disk that are written
    for other editions. runs_here: whether this machine runs any of all that it holds.
    """

    files: frozenset[Path] = frozenset()
    taken: int = 0
    runs_here: bool = False


@dataclass(frozen=True)
class ComponentPlan:
    """One component of the bundle. Sizes are in bytes.

    compute: the type of all that `precision` does not quantize.
    parameters: how many numbers its weights are.
    linked, written: its weights that stay as they are in the checkpoint's files, and those that
        are converted or quantized into new ones.
    engine: the engine file, 0 where the runtime opens the ONNX file.
    resident: its weights where it runs.
    activations, largest_activations: what a run takes besides, at the plan's `usual` and
        `largest` call.
    """

    name: str
    precision: str
    compute: str
    parameters: int
    linked: int
    written: int
    engine: int
    resident: int
    activations: int
    largest_activations: int


@dataclass(frozen=True)
class DiskPlan:
    """Bytes on the file system of the bundle.

    copied: the checkpoint's files, where they cannot be hard-linked.
    other: graphs, golden tensors, tokenizers.
    free: what is free, with what an unfinished build of this bundle holds already, and without what
        other editions take.
    shared: the checkpoint's files that another edition has too, which are there once.
    """

    written: int
    copied: int
    engines: int
    other: int
    free: int
    shared: int = 0

    @property
    def needed(self) -> int:
        """All of it."""
        return self.written + self.copied + self.engines + self.other


@dataclass(frozen=True)
class Phase:
    """A phase of the build: the component that takes most memory in it, and how many bytes."""

    name: str
    component: str
    bytes: int


@dataclass(frozen=True)
class RunMemory:
    """Bytes that pictures take where the engines run.

    low_vram: with the text encoders and the conditioner open first, then the transformer, then the
    decoder, as `generate --low-vram` has them.
    """

    all_open: int
    low_vram: int


@dataclass(frozen=True)
class Plan:
    """What a build will take.

    build: the phases of the build, each for the component that takes most memory in it.
    free_memory: bytes, None where the system does not tell.
    usual, largest: what the checkpoint draws by default, and the most that is asked for.
    impossible, shortages, warnings: in words, each a sentence without its full stop.
    """

    runtime: str
    targets: tuple[str, ...]
    components: tuple[ComponentPlan, ...]
    disk: DiskPlan
    build: tuple[Phase, ...]
    free_memory: int | None
    usual: CallSizes
    largest: CallSizes
    run: RunMemory
    largest_run: RunMemory
    impossible: tuple[str, ...] = ()
    shortages: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the build cannot be: empty where it can."""
        return self.impossible + self.shortages

    def require_possible(self) -> None:
        """Raise `UsageError` for what cannot be, and `BundleError` where room is lacking."""
        if self.impossible:
            raise UsageError(f"{'; '.join(self.impossible)}.")
        if self.shortages:
            raise BundleError(f"{'; '.join(self.shortages)}.")
