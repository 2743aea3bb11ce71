"""The CUDA calls that running an engine takes, through `cuda-python`.

Everything that touches a GPU's memory or its queue of work is in this one class, so that the logic
around it can be tested without a GPU.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fluxdeploy.errors import EngineError, MissingDependencyError
from fluxdeploy.install import install_command

__all__ = ["Argument", "Arguments", "Cuda", "TensorMap", "pinned_array"]

_MAP_BYTES = 128
_MAP_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorMap:
    """A tensor [rows, columns] on the device, as the tensor memory accelerator moves it.

    row_bytes: from one row to the next, a multiple of 16, as `address` is. box: rows and columns
    that are moved at once. element: bytes of a number. swizzle: the driver's number of a pattern.
    """

    address: int
    rows: int
    columns: int
    row_bytes: int
    element: int
    box: tuple[int, int]
    swizzle: int


Argument: TypeAlias = tuple[str, int | float] | TensorMap
"""What a kernel is given: `pointer`, `i32` or `fp32` with its value, or a tensor for the TMA."""


class Arguments:
    """A kernel's arguments in host memory, as a launch reads them."""

    def __init__(self, values: Sequence[bytes]) -> None:
        size = sum(-(-len(value) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT for value in values)
        self._memory = ctypes.create_string_buffer(size + _MAP_ALIGNMENT)
        at = -(-ctypes.addressof(self._memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        self._pointers = (ctypes.c_void_p * len(values))()
        for index, value in enumerate(values):
            ctypes.memmove(at, value, len(value))
            self._pointers[index] = at
            at += -(-len(value) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT

    @property
    def address(self) -> int:
        """Of an array with the address of each."""
        return ctypes.addressof(self._pointers)


class Cuda:
    """Streams, memory, copies and launches. Addresses, streams and functions are plain integers.

    Every call raises `EngineError` where CUDA reports a failure. Calls concern the device that
    `use_device` set in the calling thread.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise MissingDependencyError(
                f"cuda-python is not installed: {install_command('native')}, or what installs the "
                "runtime that is asked for: `fluxdeploy doctor` lists them."
            ) from error
        self._runtime: Any = runtime

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; returns what follows its status."""
        status, result = _asked(self._runtime, name, arguments)
        if status != self._runtime.cudaError_t.cudaSuccess:
            _, text = self._runtime.cudaGetErrorString(status)
            advice = (
                ". Close other programs on the GPU, make a smaller picture, or use --low-vram"
                if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation
                else ""
            )
            raise EngineError(f"{name} failed: {_words(status, text)}{advice}.")
        return result

    def device_count(self) -> int:
        return int(self._call("cudaGetDeviceCount"))

    def capability(self, device: int) -> tuple[int, int]:
        """Major and minor compute capability. Starts no context on the device."""
        attributes = self._runtime.cudaDeviceAttr
        major = self._call(
            "cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, device
        )
        minor = self._call(
            "cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, device
        )
        return int(major), int(minor)

    def use_device(self, device: int) -> None:
        """Make `device` that of this thread's calls."""
        self._call("cudaSetDevice", device)

    def free_memory(self) -> int:
        """Bytes that are free on the device."""
        free, _ = self._call("cudaMemGetInfo")
        return int(free)

    def allocate(self, size: int) -> int:
        """Device memory, aligned to 256 bytes."""
        return int(self._call("cudaMalloc", max(size, 1)))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_host(self, size: int) -> int:
        """Page-locked host memory, which the device reads and writes while the host goes on."""
        flags = self._runtime.cudaHostAllocDefault
        return int(self._call("cudaHostAlloc", max(size, 1), flags))

    def free_host(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def create_stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait for all work of a stream."""
        self._call("cudaStreamSynchronize", stream)

    def copy_in(self, device: int, host: int, size: int, stream: int) -> None:
        """Queue a copy of `size` bytes from host to device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host, size, kind, stream)

    def copy_out(self, host: int, device: int, size: int, stream: int) -> None:
        """Queue a copy of `size` bytes from device to host."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host, device, size, kind, stream)

    def multiprocessors(self, device: int) -> int:
        attribute = self._runtime.cudaDeviceAttr.cudaDevAttrMultiProcessorCount
        return int(self._call("cudaDeviceGetAttribute", attribute, device))

    @cached_property
    def _driver(self) -> Any:
        from cuda.bindings import driver

        return driver

    def _drive(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver; returns what follows its status."""
        status, result = _asked(self._driver, name, arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            _, text = self._driver.cuGetErrorString(status)
            raise EngineError(f"{name} failed: {_words(status, text)}.")
        return result

    def load_module(self, cubin: bytes) -> int:
        """Compiled kernels, on the current device."""
        return int(self._drive("cuModuleLoadData", cubin))

    def unload_module(self, module: int) -> None:
        self._drive("cuModuleUnload", module)

    def function(self, module: int, name: str, shared: int) -> int:
        """A kernel of a module, which may have `shared` bytes of shared memory."""
        function = self._drive("cuModuleGetFunction", module, name.encode())
        if shared:
            attribute = (
                self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            )
            self._drive("cuFuncSetAttribute", function, attribute, shared)
        return int(function)

    def arguments(self, values: Sequence[Argument]) -> Arguments:
        """The arguments of a launch, which holds them as long as it is used.

        A tensor takes five, as Triton's kernels have them: its map, its sizes and its strides in
        elements. Two pointers for scratch memory follow that no kernel of ours uses.
        """
        packed: list[bytes] = []
        for value in values:
            if isinstance(value, TensorMap):
                packed.append(self._tensor_map(value))
                packed += [struct.pack("i", value.rows), struct.pack("i", value.columns)]
                packed += [struct.pack("q", value.row_bytes // value.element), struct.pack("q", 1)]
            else:
                packed.append(
                    struct.pack({"pointer": "Q", "i32": "i", "fp32": "f"}[value[0]], value[1])
                )
        return Arguments([*packed, bytes(8), bytes(8)])

    def _tensor_map(self, tensor: TensorMap) -> bytes:
        driver = self._driver
        kinds = driver.CUtensorMapDataType
        kind = {
            1: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        }[tensor.element]
        made = self._drive(
            "cuTensorMapEncodeTiled",
            kind,
            2,
            tensor.address,
            [driver.cuuint64_t(tensor.columns), driver.cuuint64_t(tensor.rows)],
            [driver.cuuint64_t(tensor.row_bytes)],
            [driver.cuuint32_t(tensor.box[1]), driver.cuuint32_t(tensor.box[0])],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle(tensor.swizzle),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        return ctypes.string_at(int(made.getPtr()), _MAP_BYTES)

    def launch(
        self,
        function: int,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        arguments: Arguments,
        stream: int,
    ) -> None:
        """Queue a kernel: programs in x and y, threads of a program, its bytes of shared memory."""
        size = (*grid, 1, threads, 1, 1, shared)
        self._drive("cuLaunchKernel", function, *size, stream, arguments.address, 0)

    def begin_capture(self, stream: int) -> None:
        """What is queued from here on is recorded and not run."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """What was recorded, ready to run as one."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch_graph(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)


def _asked(module: Any, name: str, arguments: Sequence[Any]) -> tuple[Any, Any]:
    """What a function of a binding gives: its status, and what follows, a list of several."""
    try:
        status, *results = getattr(module, name)(*arguments)
    except RuntimeError as error:  # the binding's own, where a library does not load
        raise EngineError(f"{name} failed: {error}.") from error
    if not results:
        return status, None
    return status, results[0] if len(results) == 1 else results


def _words(status: Any, text: Any) -> str:
    return text.decode() if isinstance(text, bytes) else str(status)


class _Pinned:
    """A page-locked block as NumPy sees it."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": shape,
            "typestr": dtype.str,
        }


def pinned_array(cuda: Cuda, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array in page-locked memory, which is freed with the last view of the array."""
    kind = np.dtype(dtype)
    size = kind.itemsize * int(np.prod(shape, dtype=np.int64))
    address = cuda.allocate_host(size)
    block = _Pinned(address, shape, kind)
    # Not at exit: CUDA is gone by then, and the memory with it.
    weakref.finalize(block, cuda.free_host, address).atexit = False
    return np.asarray(block)
