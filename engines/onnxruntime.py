"""ONNX Runtime: the default on CPUs, and NVIDIA GPUs through its CUDA provider."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.base import (
    Array,
    Availability,
    Binding,
    Engine,
    EngineOptions,
    Extra,
    Runtime,
)
from engines.gpu import has_nvidia_driver
from engines.tensors import BoundInputs, Found, check_boundary, check_inputs, output_shape
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord
from fluxdeploy.errors import EngineError, MissingDependencyError
from fluxdeploy.install import install_command
from fluxdeploy.kernels import AttentionKernels
from fluxdeploy.machine import describe_cpu
from fluxdeploy.native import native_errors, try_threads
from fluxdeploy.precision import PRECISIONS, Quantization

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["OnnxRuntime", "OnnxRuntimeEngine"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES = {"tensor(float)": "float32", "tensor(int32)": "int32"}
_ERRORS = 3  # the least severity that is logged
_FORMATS = ("fp8", "int8", "int4")


class OnnxRuntime(Runtime):
    """Opens a component's ONNX file itself: there is nothing to build."""

    name = "onnxruntime"
    targets = ("cuda", "cpu")
    side_paths = True
    distributions = ("onnxruntime", "onnxruntime-gpu")
    extra = Extra("gpu", "ONNX Runtime on NVIDIA GPUs", ("nvidia-ml-py", "onnxruntime-gpu"))

    def availability(self, target: str, device: int = 0) -> Availability:
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, "not installed: pip install onnxruntime")
        import onnxruntime

        if _PROVIDERS[target] not in onnxruntime.get_available_providers():
            install = install_command(self.extra.name)
            return Availability(False, f"this onnxruntime has no CUDA provider: {install}")
        if target == "cuda" and not has_nvidia_driver():
            return Availability(False, "the CUDA provider is there, but no NVIDIA driver")
        return Availability(True, f"onnxruntime {self.version()}")

    def precision(self, target: str, precision: str, component: str = "transformer") -> str:
        """On CPUs bf16 becomes fp32, for want of kernels, and int8 has scales made as it runs."""
        if target != "cpu":
            return precision
        quantization = _quantization(precision)
        if quantization is None:
            return "fp32" if precision == "bf16" else precision
        if quantization.format == "int8" and quantization.activations == "static":
            wanted = replace(quantization, activations="dynamic", attention=False)
            return next(n for n, row in PRECISIONS.items() if row.quantization == wanted)
        return precision

    def compute(self, target: str, precision: str) -> str:
        """float16 around quantized weights on GPUs: its kernels take no scales in bfloat16."""
        if PRECISIONS[precision].quantization is None:
            return self.precision(target, precision)
        return "fp32" if target == "cpu" else "fp16"

    def precision_problem(self, target: str, precision: str) -> str | None:
        """FP4 takes an operator of TensorRT's own, and the products of a GPU that has them."""
        quantization = _quantization(precision)
        if quantization is None or quantization.format in _FORMATS:
            return None
        return (
            f"ONNX Runtime has no {precision.upper()}, which takes an engine that is built for a "
            "GPU; use fp8"
        )

    def emulates(self, target: str, precision: str) -> bool:
        """No CPU multiplies in FP8: values are rounded to it, and multiplied in `compute`."""
        quantization = _quantization(precision)
        return target == "cpu" and quantization is not None and quantization.format == "fp8"

    def widens_weights(self, target: str, precision: str) -> bool:
        """Integers with scales made as it runs have products of their own, and INT4 has."""
        quantization = _quantization(precision)
        if quantization is None or quantization.format == "int4":
            return False
        return not _is_dynamic(quantization)

    def attention(self, target: str, precision: str, compute: str) -> AttentionKernels:
        """Its operator takes no Q/DQ, and has a kernel for float32 alone on CPUs."""
        quantization = _quantization(precision)
        if quantization is not None and quantization.attention:
            return AttentionKernels.PLAIN
        if compute == "fp32" or target == "cuda":
            return AttentionKernels.ONNX_RUNTIME
        return AttentionKernels.PLAIN

    def open(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        root: Path,
        options: EngineOptions,
    ) -> Engine:
        return OnnxRuntimeEngine(component, record, engine, root / engine.path, options)


def _quantization(precision: str) -> Quantization | None:
    """How a precision quantizes; None too for one of a bundle that a later version has built."""
    row = PRECISIONS.get(precision)
    return None if row is None else row.quantization


def _is_dynamic(quantization: Quantization) -> bool:
    return quantization.format == "int8" and quantization.activations == "dynamic"


def _has_vnni() -> bool:
    sets = describe_cpu()["instruction_sets"]
    # Other processors than x86-64 do not overflow; their lists have no AVX2 either.
    return "avx2" not in sets or any(name.endswith("_vnni") for name in sets)


def _session(
    path: Path,
    target: str,
    options: EngineOptions,
    component: str,
    precision: str,
    emulated: bytes | None = None,
) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX Runtime is not installed: pip install onnxruntime, or for CUDA "
            f"{install_command('gpu')}."
        ) from error
    onnxruntime.set_default_logger_severity(_ERRORS)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = _ERRORS
    # A session's threads would go on looking for work for some milliseconds after a run, on the
    # cores that the next component's threads need. A picture of the demo took 1.7 times as long.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    # They do so from the session's beginning until its first run ends: while it is made, and while
    # others are. In microseconds, longer than from one operator to the next.
    settings.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    quantization = _quantization(precision)
    if quantization is not None and quantization.format == "fp8":
        # Its rewriting of quantized products is for integers: it would leave a graph that is
        # refused. FP8 runs as its emulation, with the same numbers.
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    if quantization is not None and quantization.format == "int4":
        # Products in float32. The default rounds their inputs to 8 bits, which is another
        # precision, and no faster for as many tokens as a picture has.
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if quantization is not None and _is_dynamic(quantization) and not _has_vnni():
        # Without it, products of unsigned and signed bytes overflow; this is a slower way around.
        settings.add_session_config_entry("session.x64quantprecision", "1")
    if emulated is not None:
        _run_as_written(onnxruntime, settings, path.parent)
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    provider: list[Any] = ["CPUExecutionProvider"]
    said = ""
    if target == "cuda":
        said = _load_cuda_libraries()
        # The default tries every algorithm for each new size of picture, for seconds.
        choices = {"device_id": options.device, "cudnn_conv_algo_search": "HEURISTIC"}
        provider.insert(0, ("CUDAExecutionProvider", choices))
    with native_errors(EngineError, f"ONNX Runtime cannot open {component} ({path})"):
        # A session that gets some of its threads and not all hangs.
        try_threads(options.threads or os.cpu_count() or 1)
        session = onnxruntime.InferenceSession(emulated or str(path), settings, providers=provider)
    # Where the provider's libraries do not load, the runtime goes to the CPU with no more than a
    # warning, and a bundle for GPUs would be slow, or lack kernels, without a word.
    if _PROVIDERS[target] not in session.get_providers():
        raise EngineError(
            f"ONNX Runtime could not start its {_PROVIDERS[target]} for {component}: check the "
            f"driver and the CUDA and cuDNN libraries, or use a bundle for the CPU.{said}"
        )
    return session


def _run_as_written(module: Any, settings: onnxruntime.SessionOptions, folder: Path) -> None:
    """For a graph that is no file, with its weights below `folder`: its own nodes, in their order.

    So no rounding is merged away, and no weight is widened before its turn: in the usual order all
    of them would be in memory in float32 at once.
    """
    settings.graph_optimization_level = module.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.execution_order = module.ExecutionOrder.PRIORITY_BASED
    # Planned reuse saves nothing here, and its planning grows with the square of the nodes: half a
    # minute for 7000 of them.
    settings.enable_mem_reuse = False
    # An arena would keep twice the room that widened weights take.
    settings.enable_cpu_mem_arena = False
    settings.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )


def _load_cuda_libraries() -> str:
    """Load the libraries of CUDA and cuDNN that pip installed, where the linker does not look.

    Returns what ONNX Runtime says of those that are missing, to end an error with.
    """
    import onnxruntime

    said = io.StringIO()
    with redirect_stdout(said):
        onnxruntime.preload_dlls(msvc=False)
    lines = said.getvalue().strip().splitlines()
    return f" {lines[0]}" if lines else ""


def _running(component: str) -> AbstractContextManager[None]:
    return native_errors(EngineError, f"{component} failed in ONNX Runtime")


def _tensors(nodes: Sequence[onnxruntime.NodeArg]) -> Found:
    return {
        node.name: (
            _DTYPES.get(node.type, node.type),
            tuple(size if isinstance(size, int) else None for size in node.shape),
        )
        for node in nodes
    }


class OnnxRuntimeEngine(Engine):
    """A session. `emulated` is what runs in place of the graph at `path`, over the same weights."""

    def __init__(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        path: Path,
        options: EngineOptions,
        emulated: bytes | None = None,
    ) -> None:
        super().__init__(component, record.inputs, record.outputs, engine.dimensions)
        self._device = (engine.target, options.device)
        self._session: onnxruntime.InferenceSession | None = _session(
            path, engine.target, options, component, record.precision, emulated
        )
        check_boundary(
            self, _tensors(self.session.get_inputs()), _tensors(self.session.get_outputs())
        )

    @property
    def session(self) -> onnxruntime.InferenceSession:
        return self._while_open(self._session)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_inputs(self.component, self.inputs, self.dimensions, inputs)
        names = [spec.name for spec in self.outputs]
        with _running(self.component):
            outputs = self.session.run(names, dict(inputs))
        return dict(zip(names, outputs, strict=True))

    def bind(self, resident: Mapping[str, Array]) -> Binding:
        return _OnnxRuntimeBinding(self, self._device, resident)

    def close(self) -> None:
        self._session = None


class _OnnxRuntimeBinding(Binding):
    """Resident inputs and outputs are bound once; a step rebinds only what changes."""

    def __init__(
        self, engine: OnnxRuntimeEngine, device: tuple[str, int], resident: Mapping[str, Array]
    ) -> None:
        import onnxruntime

        self._engine = engine
        self._binding = engine.session.io_binding()
        self._inputs = BoundInputs(engine, resident)
        self._outputs: dict[str, Array] = {}
        self._output_sizes: dict[str, int] | None = None
        # On the CPU a bound value is the array's own memory: a copy, so that the caller may reuse
        # the array there as on a GPU, and kept, since the binding does not own it.
        self._resident = {
            spec.name: np.array(resident[spec.name], order="C") for spec in self._inputs.resident
        }
        with _running(engine.component):
            for name, array in self._resident.items():
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array, *device)
                self._binding.bind_ortvalue_input(name, value)

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        engine = self._engine
        sizes = self._inputs.check(inputs)
        with _running(engine.component):
            if sizes != self._output_sizes:
                self._bind_outputs(sizes)
            # Held until the run is over.
            arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
            for name, array in arrays.items():
                self._binding.bind_cpu_input(name, array)
            engine.session.run_with_iobinding(self._binding)
        return self._outputs

    def _bind_outputs(self, sizes: dict[str, int]) -> None:
        self._binding.clear_binding_outputs()
        for spec in self._engine.outputs:
            shape = output_shape(spec, sizes)
            if shape is None:
                raise EngineError(
                    f"{self._engine.component}: the shape of {spec.name} does not follow from the "
                    "inputs, so it cannot be bound; use Engine.run."
                )
            array = self._outputs[spec.name] = np.empty(shape, spec.dtype)
            self._binding.bind_output(
                spec.name, "cpu", 0, array.dtype.type, shape, array.ctypes.data
            )
        self._output_sizes = sizes
