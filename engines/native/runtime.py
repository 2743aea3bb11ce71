"""Kernels of our own for NVIDIA's Hopper GPUs: an engine of the transformer, built without a GPU.

The other components are left to ONNX Runtime's CUDA provider: they are a few hundredths of a
picture's time.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from engines.base import (
    Availability,
    BuildSettings,
    Engine,
    EngineOptions,
    EngineSource,
    Extra,
    Runtime,
)
from engines.gpu import gpu_problem
from engines.native.sizes import HEADS, PROCESSES, SPLIT
from engines.onnxruntime import OnnxRuntime
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord
from fluxdeploy.errors import EngineError, MissingDependencyError, UsageError
from fluxdeploy.install import install_command
from fluxdeploy.kernels import AttentionKernels
from fluxdeploy.machine import usable_cpus
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress

__all__ = ["Native"]

_VERSION = "2"
"""Of a plan and of what runs it: an engine runs with the version that built it."""

_COMPILER = 500_000_000
"""Bytes of memory of a process that compiles kernels."""
_PACKING = 1_000_000_000
"""Bytes of memory beside these: one packed tensor, and the graph."""
_ENGINE_FILE = 8_000_000
"""Bytes of an engine besides its weights, at most: kernels, the plan, names."""


class Native(Runtime):
    """Our own kernels. Its engines are of the transformer, and take any size."""

    name = "native"
    targets = ("sm90",)
    distributions = ("fluxdeploy",)
    extra = Extra(
        "native",
        "Kernels for Hopper GPUs",
        (
            "cuda-python",
            "ml_dtypes",
            "nvidia-cudnn-cu13",
            "nvidia-cudnn-frontend",
            "nvidia-ml-py",
            "triton",
        ),
    )
    builds = True
    joins = False

    def __init__(self) -> None:
        self._others = OnnxRuntime()

    def version(self) -> str:
        """That of its engines, which it comes with."""
        return _VERSION

    def of(self, component: str, targets: tuple[str, ...]) -> tuple[Runtime, tuple[str, ...]]:
        """ONNX Runtime on CUDA for whatever is no transformer."""
        if component == "transformer":
            return self, targets
        return self._others, ("cuda",)

    def availability(self, target: str, device: int = 0) -> Availability:
        if problem := _missing() or self._gpu_problem(target, device):
            return Availability(False, problem)
        others = self._others.availability("cuda", device)
        if not others.ok:
            return Availability(
                False, f"it leaves the other components to ONNX Runtime: {others.detail}"
            )
        return Availability(True, f"kernels of our own, and the GPU is {target}")

    def can_build(self, target: str) -> Availability:
        """Building needs no GPU."""
        if not _has("triton"):
            install = install_command(self.extra.name)
            problem = f"triton, which is for Linux on x86-64, is not installed: {install}"
            return Availability(False, problem)
        for module, package in (("onnx_ir", "onnx-ir"), ("ml_dtypes", "ml_dtypes")):
            if not _has(module):
                problem = f"{package} is not installed: {install_command('export')}"
                return Availability(False, problem)
        return Availability(True, "Triton compiles its kernels, and needs no GPU for it")

    def compute(self, target: str, precision: str) -> str:
        """bfloat16, and nothing else."""
        return "bf16"

    def precision_problem(self, target: str, precision: str) -> str | None:
        """Products are in bfloat16, or in FP8 with scales that were measured before."""
        if precision == "bf16":
            return None
        quantization = PRECISIONS[precision].quantization
        if quantization is None:
            return f"{self.name} has no kernels for {precision}; use bf16"
        if quantization.format != "fp8" or quantization.activations == "dynamic":
            return f"{self.name} has no kernels for {precision}; use fp8"
        if quantization.activations is None:
            return f"{self.name} would widen the weights of {precision}; use fp8-linears or bf16"
        return None

    def attention(self, target: str, precision: str, compute: str) -> AttentionKernels:
        return AttentionKernels.NATIVE

    def size_problem(self, width: int, head_dim: int) -> str | None:
        if head_dim not in HEADS:
            return (
                f"its heads are {head_dim} wide, and the kernels of {self.name} are for "
                f"{', '.join(map(str, HEADS))}; use --runtime onnxruntime"
            )
        if width % SPLIT:
            return (
                f"it is {width} wide, and the kernels of {self.name} are for multiples of {SPLIT}; "
                "use --runtime onnxruntime"
            )
        return None

    def builder(self) -> str:
        """Its kernels are Triton's work."""
        try:
            return f"triton {importlib.metadata.version('triton')}"
        except importlib.metadata.PackageNotFoundError:
            return ""

    def building_memory(self, weights: int) -> int:
        return _PACKING + _COMPILER * min(PROCESSES, usable_cpus())

    def engine_size(self, weights: int) -> int:
        return weights + _ENGINE_FILE

    def build(
        self,
        source: EngineSource,
        targets: Sequence[str],
        settings: BuildSettings,
        destination: Path,
        progress: Progress,
    ) -> tuple[Path, ...]:
        """The second file, `<component>.kernels.json`, lists the engine's steps.

        With `strict` a layer that is wider than the precision asks is an error.
        """
        self._check_source(source, targets)
        from engines.native.build import build_engine

        return build_engine(source, settings.strict, destination, progress)

    def _check_source(self, source: EngineSource, targets: Sequence[str]) -> None:
        """Refuse what cannot be, before any work."""
        (target, *_) = self.checked_targets(source, targets)
        if source.component != "transformer":
            raise UsageError(
                f"{self.name} has engines of the transformer alone: {source.component} runs in "
                "ONNX Runtime."
            )
        available = self.can_build(target)
        if not available.ok:
            raise MissingDependencyError(
                f"{self.name} cannot build for {target}: {available.detail}."
            )

    def open(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        root: Path,
        options: EngineOptions,
    ) -> Engine:
        self._check(component, engine, options.device)
        from engines.native.run import open_engine

        return open_engine(component, record, engine, root / engine.path, options)

    def _check(self, component: str, engine: EngineRecord, device: int) -> None:
        """Refuse what cannot run, before the GPU is touched."""
        if problem := _missing():
            raise MissingDependencyError(f"{component} needs cuDNN: {problem}.")
        if engine.runtime_version != self.version():
            raise EngineError(
                f"{component} was built as version {engine.runtime_version} of {self.name} "
                f"engines, and this fluxdeploy runs version {self.version()}: build the bundle "
                "again."
            )
        if problem := self._gpu_problem(engine.target, device):
            raise EngineError(f"{component} was built for {engine.target}, but {problem}.")

    def _gpu_problem(self, target: str, device: int = 0) -> str | None:
        return gpu_problem(target, device, self.name, self.targets, self.extra.name)


def _missing() -> str | None:
    """What is not installed of cuDNN: its front end, or the library."""
    install = install_command(Native.extra.name)
    if not _has("cudnn"):
        return f"nvidia-cudnn-frontend is not installed: {install}"
    # A package of pip's, or whatever the linker finds: where the front end looks.
    if not _has("nvidia.cudnn") and ctypes.util.find_library("cudnn") is None:
        return f"there is no cuDNN library: {install}"
    return None


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of a package around it
        return False
