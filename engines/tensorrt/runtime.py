"""TensorRT and TensorRT-RTX: engines that are built ahead for a kind of NVIDIA GPU.

Both have the same Python interface under different module names. TensorRT-RTX builds for several
kinds of GPU at once and needs none to build; TensorRT builds for the GPU of this machine.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from engines.targets import GENERATIONS, hardware_problem, in_words
from engines.tensorrt.formats import FORMATS
from fluxdeploy.bundle.files import is_private, user_cache, write_atomic
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord
from fluxdeploy.errors import EngineError, MissingDependencyError, UsageError
from fluxdeploy.install import install_command
from fluxdeploy.kernels import AttentionKernels
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from engines.tensorrt.run import Scratch

__all__ = ["TensorRt", "TensorRtRtx"]

_BUILDER = 3
"""Memory of the builder as a multiple of the weights it is given, as measured."""
_BUILDER_OVERHEAD = 300_000_000
"""Bytes of the builder without any weights."""
_ENGINE_FILE = 12_000_000
"""Bytes of an engine besides its weights, at most: kernels, tactics, names."""


class TensorRt(Runtime):
    """TensorRT. Its engines run on the compute capability that they were built on."""

    name = "tensorrt"
    targets: tuple[str, ...] = tuple(reversed(GENERATIONS))
    distributions: tuple[str, ...] = ("tensorrt", "tensorrt_cu13", "tensorrt_cu12")
    extra: Extra = Extra("tensorrt", "TensorRT", ("cuda-python", "nvidia-ml-py", "tensorrt"))
    builds = True
    tuned = True
    shares_scratch = True

    product = "TensorRT"
    module = "tensorrt"

    def __init__(self) -> None:
        self._scratch: dict[int, Scratch] = {}

    def availability(self, target: str, device: int = 0) -> Availability:
        if problem := self._missing() or self._gpu_problem(target, device):
            return Availability(False, problem)
        return Availability(True, f"{self.product} {self.version()}, and the GPU is {target}")

    def can_build(self, target: str) -> Availability:
        if problem := self._missing() or self._gpu_problem(target):
            return Availability(False, f"{self.product} builds for the GPU it has: {problem}")
        return Availability(True, f"{self.product} {self.version()}")

    def compute(self, target: str, precision: str) -> str:
        """bfloat16 around whatever is quantized, and float16 where there is no bfloat16."""
        if PRECISIONS[precision].quantization is None:
            return precision
        return "fp16" if target == "sm75" else "bf16"

    def precision_problem(self, target: str, precision: str) -> str | None:
        """The limits are the hardware's, but for three.

        Scales made as it runs are in operators that TensorRT does not read, a format needs kernels,
        and TensorRT-RTX has no float32 products for Turing, so that float16 is all there is.
        """
        quantization = PRECISIONS[precision].quantization
        if quantization is not None and quantization.activations == "dynamic":
            return f"{precision} is for ONNX Runtime on CPUs; use int8 on GPUs"
        if quantization is not None and quantization.format not in FORMATS:
            return f"{self.product} has no kernels for {precision}; use bf16"
        if precision == "fp32" and target == "sm75":
            return f"{in_words(target)} has no float32 products in TensorRT-RTX; use fp16"
        return hardware_problem(target, precision)

    def attention(self, target: str, precision: str, compute: str) -> AttentionKernels:
        return AttentionKernels.TENSORRT

    def building_memory(self, weights: int) -> int:
        return _BUILDER_OVERHEAD + _BUILDER * weights

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
        """The second file, `<component>.kernels.json`, lists the engine's kernels.

        It is there for an engine of other kernels than were asked for, too.
        """
        from engines.tensorrt.build import build_engine, check_profiles
        from engines.tensorrt.fusion import check, expect, unfused

        unique = self.checked_targets(source, targets)
        check_profiles(source.component, source.inputs, settings.profiles)
        trt = self._import()
        for target in unique:
            available = self.can_build(target)
            if not available.ok:
                raise UsageError(f"{self.name} cannot build for {target}: {available.detail}.")
        timings = self._timings(unique)
        fusion = build_engine(trt, source, unique, settings, timings, destination, progress)
        report = destination.with_suffix(".kernels.json")
        write_atomic(report, fusion.as_json())
        expectation = expect(source)
        problems = check(fusion, expectation)
        slower = unfused(fusion, expectation)
        if slower is not None and settings.strict:
            problems.append(slower)
        elif slower is not None:
            progress.note(f"  {source.component}: {slower}; {report.name} has all kernels")
        if problems:
            raise EngineError(
                f"The {source.component} engine for {', '.join(unique)} is not the "
                f"{source.precision.name} engine that was asked for: {'; '.join(problems)}. Its "
                f"kernels are listed in {report}."
            )
        return destination, report

    def _timings(self, targets: Sequence[str]) -> Path | None:
        """What the builder measured for these targets, for whatever it builds next.

        None where others could have written it.
        """
        if not is_private(user_cache()):
            return None
        return user_cache() / f"{self.name}-{self.version()}-{'+'.join(targets)}.timings"

    def open(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        root: Path,
        options: EngineOptions,
    ) -> Engine:
        self._check(component, engine, options.device)
        from engines.cuda import Cuda
        from engines.tensorrt.loaded import load_engine
        from engines.tensorrt.run import Scratch, TensorRtEngine

        cuda = Cuda()
        cuda.use_device(options.device)
        loaded = load_engine(self._import(), cuda, root / engine.path, component)
        scratch = self._scratch.setdefault(options.device, Scratch(cuda))
        return TensorRtEngine(component, record, engine, loaded, cuda, scratch, options)

    def _check(self, component: str, engine: EngineRecord, device: int) -> None:
        """Refuse what cannot run, before the GPU is touched."""
        if problem := self._missing():
            raise MissingDependencyError(f"{component} needs {self.product}, which is {problem}.")
        if engine.runtime_version != self.version():
            raise EngineError(
                f"{component} was built with {self.product} {engine.runtime_version}, and "
                f"{self.version()} is installed: engines run with the version that built them. "
                "Install that one, or build the bundle again."
            )
        if problem := self._gpu_problem(engine.target, device):
            raise EngineError(f"{component} was built for {engine.target}, but {problem}.")

    def _missing(self) -> str | None:
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: {install_command(self.extra.name)}"
        return None

    def _gpu_problem(self, target: str, device: int = 0) -> str | None:
        return gpu_problem(target, device, self.product, self.targets, self.extra.name)

    def _import(self) -> Any:
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:  # OSError: a library that it loads itself
            raise MissingDependencyError(
                f"{self.product} cannot be imported ({error}): {install_command(self.extra.name)}."
            ) from error


class TensorRtRtx(TensorRt):
    """TensorRT-RTX. Engines hold code that is compiled on the GPU that runs them."""

    name = "tensorrt-rtx"
    targets = ("sm121", "sm120", "sm89", "sm86", "sm80", "sm75")
    distributions = ("tensorrt_rtx",)
    extra = Extra("rtx", "TensorRT-RTX", ("cuda-python", "nvidia-ml-py", "tensorrt-rtx"))

    product = "TensorRT-RTX"
    module = "tensorrt_rtx"

    def can_build(self, target: str) -> Availability:
        """Building needs no GPU."""
        if problem := self._missing():
            return Availability(False, problem)
        return Availability(True, f"{self.product} {self.version()}, which needs no GPU to build")

    def _timings(self, targets: Sequence[str]) -> Path | None:
        """It times nothing."""
        return None
