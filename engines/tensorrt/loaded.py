"""TensorRT's own objects: an engine read from disk, and the calls that running it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engines.cuda import Cuda
from fluxdeploy.errors import EngineError

__all__ = ["LoadedEngine", "Profile", "Shape", "load_engine"]

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""The smallest, best and largest shape of each input."""

_CHUNK = 64 << 20
_RESERVE = 1 << 30
"""Bytes to leave free on the GPU for activations before weights are streamed instead."""


class LoadedEngine:
    """A deserialized engine and its execution context: the calls into the library, no more.

    One context serves all profiles and shapes. Its scratch memory is the caller's. Methods raise
    `EngineError` where the library reports a failure.
    """

    def __init__(
        self, component: str, trt: Any, runtime: Any, engine: Any, errors: list[str]
    ) -> None:
        self.component = component
        self._errors = errors
        self._trt, self._runtime, self._engine = trt, runtime, engine
        # Scratch memory is the caller's: one block for all engines.
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context = engine.create_execution_context(strategy)
        if self._context is None:
            raise self._failure("cannot make an execution context")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.tensors = {n: self._dtype(n) for n in names}
        self.profiles: tuple[Profile, ...] = tuple(
            {name: self._profile_shapes(name, index) for name in inputs}
            for index in range(engine.num_optimization_profiles)
        )

    def _profile_shapes(self, name: str, index: int) -> tuple[Shape, Shape, Shape]:
        smallest, best, largest = self._engine.get_tensor_profile_shape(name, index)
        return tuple(smallest), tuple(best), tuple(largest)

    def _dtype(self, name: str) -> str:
        kind = self._engine.get_tensor_dtype(name)
        try:
            return str(np.dtype(self._trt.nptype(kind)).name)
        except TypeError:  # a type that NumPy has not, such as bfloat16
            return str(kind)

    def set_profile(self, index: int, stream: int) -> None:
        if self._context.active_optimization_profile != index:
            self._require(
                self._context.set_optimization_profile_async(index, stream), f"profile {index}"
            )

    def set_shape(self, name: str, shape: Shape) -> None:
        self._require(self._context.set_input_shape(name, shape), f"shape {list(shape)} of {name}")

    def set_address(self, name: str, address: int) -> None:
        self._require(self._context.set_tensor_address(name, address), f"the address of {name}")

    def shape(self, name: str) -> Shape:
        """The shape of a tensor; those of outputs follow from the inputs' that were set."""
        return tuple(self._context.get_tensor_shape(name))

    def scratch_size(self) -> int:
        """Bytes of scratch memory for the profile and the shapes that were set."""
        return int(self._context.update_device_memory_size_for_shapes())

    def set_scratch(self, address: int, size: int) -> None:
        self._context.set_device_memory(address, size)

    def enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise self._failure("failed while it ran")

    def close(self) -> None:
        """Destroy the context, the engine and the runtime, in this order."""
        self._context = None
        self._engine = None
        self._runtime = None

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise self._failure(f"refuses {what}")

    def _failure(self, what: str) -> EngineError:
        reason = "; ".join(self._errors[-2:]) or "it gives no reason"
        self._errors.clear()
        return EngineError(f"{self.component}: TensorRT {what}: {reason.rstrip('.')}.")


def load_engine(trt: Any, cuda: Cuda, path: Path, component: str) -> LoadedEngine:
    """Deserialize the engine at `path`, streamed from disk. The GPU must be the current device.

    Raises `EngineError` where the file cannot be read or is not for this machine.
    """
    errors: list[str] = []
    logger = _make_logger(trt, errors)

    def failure(why: str) -> EngineError:
        reason = ("; ".join(errors[-2:]) or why).rstrip(".")
        return EngineError(f"TensorRT cannot open {component} ({path}): {reason}.")

    try:
        runtime = trt.Runtime(logger)
    except TypeError as error:  # the binding's own, where the library makes nothing
        raise failure("it does not start: look at the NVIDIA driver, `nvidia-smi`") from error
    try:
        with open(path, "rb", buffering=0) as file:
            _check_validity(trt, runtime, file, failure)
            engine = runtime.deserialize_cuda_engine(_make_reader(trt, file))
    except RuntimeError as error:  # the reader's own, where the driver does not load
        raise failure(str(error)) from error
    except OSError as error:
        raise failure(error.strerror or str(error)) from error
    if engine is None:
        raise failure("the file is not an engine of this version")
    _stream_weights(cuda, engine)
    return LoadedEngine(component, trt, runtime, engine, errors)


def _check_validity(
    trt: Any, runtime: Any, file: BinaryIO, failure: Callable[[str], EngineError]
) -> None:
    """Let the library refuse an engine by its header, before gigabytes are read.

    TensorRT-RTX can; TensorRT, up to 11, reads the engine to know.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    header = file.read(runtime.engine_header_size)
    file.seek(0)
    validity, _ = runtime.get_engine_validity(header)
    if validity == trt.EngineValidity.INVALID:
        raise failure("the engine is not valid on this GPU with this version")


def _stream_weights(cuda: Cuda, engine: Any) -> None:
    """Keep weights on the host where the GPU cannot hold them all, if the engine may do so."""
    streamable = engine.streamable_weights_size
    if streamable and cuda.free_memory() < streamable + _RESERVE:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()


def _make_logger(trt: Any, errors: list[str]) -> Any:
    severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in severe:
                errors.append(" ".join(msg.split()))

    return Logger()


def _make_reader(trt: Any, file: BinaryIO) -> Any:
    """A reader that gives the file in pieces."""
    origins = {
        trt.SeekPosition.SET: 0,
        trt.SeekPosition.CUR: 1,
        trt.SeekPosition.END: 2,
    }

    class Reader(trt.IStreamReaderV2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)

        def read(self, num_bytes: int, stream: int) -> bytes:
            # Less than was asked for: the binding asks again, from TensorRT 10.9 on, and one piece
            # is in memory at most.
            try:
                return file.read(min(num_bytes, _CHUNK))
            except OSError:  # an exception must not pass through the library; no bytes end it
                return b""

        def seek(self, offset: int, where: Any) -> bool:
            try:
                file.seek(offset, origins[where])
            except OSError:
                return False
            return True

    return Reader()
