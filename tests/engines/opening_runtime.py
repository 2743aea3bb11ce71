"""A runtime that opens ONNX files, as somebody would add one: this module, and a line of registry.

It runs the tiny component of `tests.engines.conftest`, whatever file it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engines.base import Array, Availability, Binding, Engine, EngineOptions, Extra, Runtime
from engines.tensors import BoundInputs, check_inputs
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord
from fluxdeploy.precision import PRECISIONS
from tests.engines.conftest import expected

__all__ = ["OpeningRuntime", "TinyEngine"]


class OpeningRuntime(Runtime):
    """On neural processors, two of them; in float32, and with int8 weights in 8 bits."""

    name = "opening"
    targets = ("npu-large", "npu-small")
    distributions = ("numpy",)
    extra = Extra("npu", "Opening on neural processors", ("opening-runtime", "numpy"))

    def availability(self, target: str, device: int = 0) -> Availability:
        return Availability(device < 2, f"there are 2 of {target}")

    def precision(self, target: str, precision: str, component: str = "transformer") -> str:
        return "fp32" if PRECISIONS[precision].quantization is None else precision

    def compute(self, target: str, precision: str) -> str:
        return "fp32"

    def precision_problem(self, target: str, precision: str) -> str | None:
        quantization = PRECISIONS[precision].quantization
        if quantization is None or quantization.format == "int8":
            return None
        return f"{target} has no {precision}; use int8"

    def emulates(self, target: str, precision: str) -> bool:
        return PRECISIONS[precision].quantization is not None

    def open(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        root: Path,
        options: EngineOptions,
    ) -> Engine:
        assert (root / engine.path).is_file()
        return TinyEngine(component, record, engine, options)


class TinyEngine(Engine):
    def __init__(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        options: EngineOptions,
    ) -> None:
        super().__init__(component, record.inputs, record.outputs, engine.dimensions)
        self.target, self.options = engine.target, options

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_inputs(self.component, self.inputs, self.dimensions, inputs)
        return {"y": expected(**inputs)}

    def bind(self, resident: Mapping[str, Array]) -> Binding:
        return _TinyBinding(self, resident)

    def close(self) -> None:
        pass


class _TinyBinding(Binding):
    def __init__(self, engine: TinyEngine, resident: Mapping[str, Array]) -> None:
        self._inputs = BoundInputs(engine, resident)
        self._engine = engine
        self._resident = {name: np.array(array) for name, array in resident.items()}

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        self._inputs.check(inputs)
        return self._engine.run({**self._resident, **inputs})
