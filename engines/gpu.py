"""The NVIDIA GPU of this machine, as far as runtimes must know it before they use it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from fluxdeploy.errors import EngineError
from fluxdeploy.install import install_command

__all__ = ["compute_capability", "gpu_problem", "has_cuda_python", "has_nvidia_driver"]


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


def gpu_problem(
    target: str, device: int, product: str, targets: Sequence[str], extra: str
) -> str | None:
    """Why what is built for `target` cannot run on a GPU here, or None where it can.

    product: what would run it, which supports `targets` and comes with `extra`. device: the index
    of the GPU.
    """
    if not has_nvidia_driver():
        return "installed, but there is no NVIDIA driver"
    if not has_cuda_python():
        return f"cuda-python is not installed: {install_command(extra)}"
    try:
        found = compute_capability(device)
    except EngineError as error:
        return f"the NVIDIA driver does not answer: {str(error).rstrip('.')}"
    if found is None:
        return f"there is an NVIDIA driver, but no GPU {device}"
    if found not in targets:
        return f"the GPU is {found}, which {product} does not support"
    return None if found == target else f"the GPU is {found}"
