"""The NVIDIA GPU of this machine, as far as runtimes must know it before they use it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["compute_capability", "has_cuda_python", "has_nvidia_driver"]


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded. Imports and starts nothing."""
    return any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia"))


def has_cuda_python() -> bool:
    """Whether the package `cuda-python` is installed."""
    try:
        return importlib.util.find_spec("cuda.bindings.runtime") is not None
    except ImportError:  # of a package around it
        return False


def compute_capability(device: int = 0) -> str | None:
    """The compute capability of a GPU as a target, such as `sm89`; None where there is none.

    Raises `EngineError` where the driver does not answer.
    """
    from engines.cuda import Cuda

    if not has_nvidia_driver() or not has_cuda_python():
        return None
    cuda = Cuda()
    if device >= cuda.device_count():
        return None
    major, minor = cuda.capability(device)
    return f"sm{major}{minor}"
