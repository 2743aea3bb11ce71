"""What the driver tells of an NVIDIA GPU: its name, its memory in use, the energy it has taken."""

from __future__ import annotations

from typing import Any

__all__ = ["GpuMeter", "open_meter"]


class GpuMeter:
    """Reads one GPU through NVML. Use `open_meter`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    def name(self) -> str:
        """What the GPU is called; empty where the driver does not tell."""
        return str(self._tell(self._nvml.nvmlDeviceGetName) or "")

    def memory(self) -> int | None:
        """Bytes in use, by all processes."""
        memory = self._tell(self._nvml.nvmlDeviceGetMemoryInfo)
        return None if memory is None else int(memory.used)

    def energy(self) -> float | None:
        """Joules since the driver was loaded; None for GPUs that do not count them."""
        millijoules = self._tell(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1000

    def _tell(self, ask: Any) -> Any:
        try:
            return ask(self._handle)
        except self._nvml.NVMLError:
            return None


def open_meter(device: int = 0) -> GpuMeter | None:
    """The meter of a GPU; None without a driver, without that GPU, or without `nvidia-ml-py`."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return GpuMeter(pynvml, pynvml.nvmlDeviceGetHandleByIndex(device))
    except pynvml.NVMLError:
        return None
