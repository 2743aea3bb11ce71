"""A runtime that builds engines, as somebody would add one. Its engines hold what was asked for."""

from __future__ import annotations

import json
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
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord
from fluxdeploy.errors import EngineError
from fluxdeploy.kernels import AttentionKernels
from fluxdeploy.progress import Progress
from tests.engines.opening_runtime import TinyEngine

__all__ = ["BuildingRuntime"]


class BuildingRuntime(Runtime):
    """For one accelerator, where attention's scores never lie in memory."""

    name = "building"
    targets = ("tpu",)
    distributions = ("building-runtime",)
    extra = Extra("tpu", "Building for accelerators", ("building-runtime",))
    builds = True
    shares_scratch = True

    def availability(self, target: str, device: int = 0) -> Availability:
        return Availability(False, "there is no accelerator")

    def compute(self, target: str, precision: str) -> str:
        return "bf16"

    def attention(self, target: str, precision: str, compute: str) -> AttentionKernels:
        return AttentionKernels.TENSORRT

    def engine_size(self, weights: int) -> int:
        return weights + 1000

    def building_memory(self, weights: int) -> int:
        return 7

    def open(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        root: Path,
        options: EngineOptions,
    ) -> Engine:
        return TinyEngine(component, record, engine, options)

    def build(
        self,
        source: EngineSource,
        targets: Sequence[str],
        settings: BuildSettings,
        destination: Path,
        progress: Progress,
    ) -> tuple[Path, ...]:
        asked = [source.precision.name, source.compute, source.quantized, source.attentions]
        destination.write_text(json.dumps([*asked, source.weight_bytes, list(targets)]))
        if source.quantized == 0:
            raise EngineError(f"The {source.component} engine has no {source.precision.name}.")
        return (destination,)
