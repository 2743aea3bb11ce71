"""The runtime that has the numbers of any bundle, and the speed of none."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from engines.base import Availability, Engine, EngineOptions, Runtime
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord
from fluxdeploy.errors import EngineError, MissingDependencyError
from fluxdeploy.install import install_command
from fluxdeploy.native import native_errors

__all__ = ["Emulate"]


class Emulate(Runtime):
    """Opens the graph of a component, whatever engines it has, in float32 with its own rounding."""

    name = "emulate"
    targets = ("cpu",)
    distributions = ("onnxruntime", "onnxruntime-gpu")

    def availability(self, target: str, device: int = 0) -> Availability:
        for package in ("onnxruntime", "onnx"):
            if importlib.util.find_spec(package) is None:
                extra = "export" if package == "onnx" else None
                return Availability(False, f"{package} is not installed: {install_command(extra)}")
        return Availability(True, "the numbers of any bundle, slowly, where --runtime names it")

    def engines(self, component: str, record: ComponentRecord) -> Mapping[str, EngineRecord]:
        """The graph that every component has. It takes any size.

        A batch is limited as the component's own engines limit it: hosts divide larger ones, and
        all pictures at once would take all memory.
        """
        path = next((f.path for f in record.files if f.path.endswith(".onnx")), None)
        if path is None:
            return {}
        batches = [e.dimensions["B"] for e in record.engines if "B" in e.dimensions]
        largest = {"B": max(batches, key=lambda sizes: sizes.max)} if batches else {}
        return {"cpu": EngineRecord(self.name, self.version(), "cpu", path, largest)}

    def compute(self, target: str, precision: str) -> str:
        return "fp32"

    def emulates(self, target: str, precision: str) -> bool:
        return precision != "fp32"

    def open(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        root: Path,
        options: EngineOptions,
    ) -> Engine:
        try:
            from engines.emulate.graph import emulate
        except ImportError as error:
            raise MissingDependencyError(
                f"Emulating {component} needs the package onnx: {install_command('export')}."
            ) from error
        from engines.onnxruntime import OnnxRuntimeEngine

        path = root / engine.path
        with native_errors(EngineError, f"{component} ({path}) cannot be emulated"):
            emulated = emulate(path.read_bytes())
        return OnnxRuntimeEngine(component, record, engine, path, options, emulated)
