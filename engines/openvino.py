"""OpenVINO on CPUs: bfloat16 products where the processor has them, and 8-bit ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.base import Array, Availability, Binding, Engine, EngineOptions, Extra, Runtime
from engines.tensors import BoundInputs, Found, check_boundary
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, TensorSpec
from fluxdeploy.errors import EngineError, MissingDependencyError
from fluxdeploy.install import install_command
from fluxdeploy.machine import describe_cpu
from fluxdeploy.native import native_errors
from fluxdeploy.precision import PRECISIONS, Precision

if TYPE_CHECKING:
    import openvino

__all__ = ["OpenVino"]

_WIDE = ("clip", "t5", "redux", "ip_adapter_encoder", "ip_adapter", "conditioner")
"""Computed in float32: they run once a picture, and what they round away is
missing in every step. With its hint for bfloat16, OpenVINO rounds the angles of the timestep's
sines too, which puts a conditioner of FLUX.1's width off by a third of its range."""

_TYPES = ("fp32", "bf16")
_FORMATS = ("int8", "int4")
_DTYPES = {"f32": "float32", "i32": "int32"}


class OpenVino(Runtime):
    """Opens a component's ONNX file itself: there is nothing to build."""

    name = "openvino"
    targets = ("cpu",)
    side_paths = True
    distributions = ("openvino",)
    extra = Extra("openvino", "OpenVINO on CPUs", ("openvino",))

    def availability(self, target: str, device: int = 0) -> Availability:
        if importlib.util.find_spec("openvino") is None:
            return Availability(False, f"not installed: {install_command(self.extra.name)}")
        return Availability(True, f"openvino {self.version()}")

    def precision(self, target: str, precision: str, component: str = "transformer") -> str:
        """Without bfloat16 in the processor a graph in it takes minutes for a step: it is fp32.

        So is what computes in float32 in any case: a graph in bfloat16 would round in between.
        """
        wide = component in _WIDE or not _has_bf16()
        return "fp32" if precision == "bf16" and wide else precision

    def compute(self, target: str, precision: str) -> str:
        """bfloat16 around whatever is quantized, and float32 where the processor has no such."""
        if PRECISIONS[precision].quantization is None:
            return precision
        return "bf16" if _has_bf16() else "fp32"

    def precision_problem(self, target: str, precision: str) -> str | None:
        possible = [name for name, row in PRECISIONS.items() if _has(row)]
        if precision in possible:
            return None
        return f"OpenVINO has no {precision} on CPUs; use {', '.join(possible)}"

    def widens_weights(self, target: str, precision: str) -> bool:
        """INT4 is widened as its product goes on."""
        quantization = PRECISIONS[precision].quantization
        return quantization is not None and quantization.format != "int4"

    def open(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        root: Path,
        options: EngineOptions,
    ) -> Engine:
        return _OpenVinoEngine(component, record, engine, root / engine.path, options)


def _has(row: Precision) -> bool:
    """Float types that it computes in, and integers with scales that are in the graph."""
    quantization = row.quantization
    if quantization is None:
        return row.name in _TYPES
    return quantization.format in _FORMATS and quantization.activations != "dynamic"


def _has_bf16() -> bool:
    return any("bf16" in name for name in describe_cpu()["instruction_sets"])


@cache
def _core() -> openvino.Core:
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            f"OpenVINO is not installed: {install_command('openvino')}."
        ) from error
    return openvino.Core()


def _compile(
    path: Path, compute: str, options: EngineOptions, component: str
) -> openvino.CompiledModel:
    with native_errors(EngineError, f"OpenVINO cannot open {component} ({path})"):
        core = _core()
        return core.compile_model(
            core.read_model(path), "CPU", _settings(core, compute, options, component)
        )


def _settings(
    core: openvino.Core, compute: str, options: EngineOptions, component: str
) -> dict[str, Any]:
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    narrow = compute == "bf16" and has_bf16 and component not in _WIDE
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        # 8-bit inputs of linears whose weights alone are quantized would be another precision.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    if options.threads is not None:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    return settings


def _running(component: str) -> AbstractContextManager[None]:
    return native_errors(EngineError, f"{component} failed in OpenVINO")


def _tensors(ports: Sequence[Any], specs: Sequence[TensorSpec]) -> Found:
    """What a compiled model takes or gives.

    A port has more names than one where a step of the graph changes nothing and is left out, such
    as a cast to the same type: of those, the one that `specs` has counts.
    """
    wanted = {spec.name for spec in specs}
    return {
        name: (
            _DTYPES.get(port.element_type.get_type_name(), port.element_type.get_type_name()),
            tuple(size.get_length() if size.is_static else None for size in port.partial_shape),
        )
        for port in ports
        for name in port.names & wanted or port.names
    }


class _OpenVinoEngine(Engine):
    def __init__(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        path: Path,
        options: EngineOptions,
    ) -> None:
        super().__init__(component, record.inputs, record.outputs, engine.dimensions)
        self._model: openvino.CompiledModel | None = _compile(
            path, record.compute, options, component
        )
        check_boundary(
            self,
            _tensors(self._model.inputs, self.inputs),
            _tensors(self._model.outputs, self.outputs),
        )

    def model(self) -> openvino.CompiledModel:
        """The compiled model. Raises `EngineError` once the engine was closed."""
        return self._while_open(self._model)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {name: array.copy() for name, array in self.bind({}).run(inputs).items()}

    def bind(self, resident: Mapping[str, Array]) -> Binding:
        return _OpenVinoBinding(self, resident)

    def close(self) -> None:
        self._model = None


class _OpenVinoBinding(Binding):
    """A request of its own, whose tensors are the arrays' memory."""

    def __init__(self, engine: _OpenVinoEngine, resident: Mapping[str, Array]) -> None:
        self._engine = engine
        with _running(engine.component):
            self._request = engine.model().create_infer_request()
        self._inputs = BoundInputs(engine, resident)
        # A copy, so that the caller may reuse the array, and kept, since a request does not own it.
        self._resident = {
            spec.name: np.array(resident[spec.name], order="C") for spec in self._inputs.resident
        }
        self._place(self._resident)

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        engine = self._engine
        engine.model()  # A request would go on working with a closed engine.
        self._inputs.check(inputs)
        with _running(engine.component):
            # Held until the run is over.
            arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
            self._place(arrays)
            self._request.infer(share_outputs=True)
        return {spec.name: self._request.get_tensor(spec.name).data for spec in engine.outputs}

    def _place(self, arrays: Mapping[str, Array]) -> None:
        import openvino

        for name, array in arrays.items():
            self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
