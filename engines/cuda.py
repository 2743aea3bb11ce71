"""The CUDA calls that running an engine takes, through `cuda-python`.

Everything that touches a GPU's memory or its queue of work is in this one class, so that the logic
around it can be tested without a GPU.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fluxdeploy.errors import EngineError, MissingDependencyError
from fluxdeploy.install import install_command

__all__ = ["Cuda", "pinned_array"]


class Cuda:
    """Streams, memory and copies. Addresses and streams are plain integers.

    Every call raises `EngineError` where CUDA reports a failure. Calls concern the device that
    `use_device` set in the calling thread.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise MissingDependencyError(
                f"cuda-python is not installed: {install_command('rtx')}, or for TensorRT "
                f"{install_command('tensorrt')}."
            ) from error
        self._runtime: Any = runtime

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; returns what follows its status."""
        try:
            status, *results = getattr(self._runtime, name)(*arguments)
        except RuntimeError as error:  # the binding's own, where a library does not load
            raise EngineError(f"{name} failed: {error}.") from error
        if status != self._runtime.cudaError_t.cudaSuccess:
            _, text = self._runtime.cudaGetErrorString(status)
            words = text.decode() if isinstance(text, bytes) else str(status)
            advice = (
                ". Close other programs on the GPU, make a smaller picture, or use --low-vram"
                if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation
                else ""
            )
            raise EngineError(f"{name} failed: {words}{advice}.")
        if not results:
            return None
        return results[0] if len(results) == 1 else results

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
