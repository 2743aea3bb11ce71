"""What the driver tells of an NVIDIA GPU: its name, its memory in use, the energy it has taken."""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

__all__ = ["GpuMeter", "open_meter"]

_NAME_LENGTH = 96


class _Memory(ctypes.Structure):
    """`nvmlMemory_t`, in bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class GpuMeter:
    """Reads one GPU. Use `open_meter`."""

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library = library
        self._handle = handle

    def name(self) -> str:
        """What the GPU is called; empty where the driver does not tell."""
        buffer = ctypes.create_string_buffer(_NAME_LENGTH)
        failed = self._library.nvmlDeviceGetName(self._handle, buffer, _NAME_LENGTH)
        return "" if failed else buffer.value.decode(errors="replace")

    def memory(self) -> int | None:
        """Bytes in use, by all processes."""
        memory = _Memory()
        failed = self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory))
        return None if failed else int(memory.used)

    def energy(self) -> float | None:
        """Joules since the driver was loaded; None for GPUs that do not count them."""
        millijoules = ctypes.c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(
            self._handle, ctypes.byref(millijoules)
        )
        return None if failed else millijoules.value / 1000


def open_meter(device: int = 0) -> GpuMeter | None:
    """The meter of a GPU; None without a driver, or without that GPU."""
    name = ctypes.util.find_library("nvidia-ml") or "libnvidia-ml.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2():
        return None
    if library.nvmlDeviceGetHandleByIndex_v2(device, ctypes.byref(handle)):
        return None
    return GpuMeter(library, handle)
