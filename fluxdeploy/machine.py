"""What this machine is, for `doctor` and for everything that records a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Memory",
    "describe_cpu",
    "describe_machine",
    "peak_memory",
    "read_memory",
    "resident_memory",
    "usable_cpus",
]

_PROC = Path("/proc")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")

# As Linux spells them in /proc/cpuinfo: x86-64, then Arm.
_CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def describe_cpu() -> dict[str, Any]:
    """Model, usable cores, and the instruction sets that decide how fast a precision runs."""
    facts: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip().lower(), value.strip())
    flags = set(facts.get("flags", facts.get("features", "")).split())
    return {
        "name": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cpus(),
        "instruction_sets": [name for name in _CPU_FEATURES if name in flags],
    }


def usable_cpus() -> int:
    """The logical CPUs that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Memory:
    """Bytes of memory that processes here may have; None where the system does not tell.

    total: all of it, or a container's limit. available: what a new process can have of it.
    swap: what there is besides, on disks.
    """

    total: int | None
    available: int | None
    swap: int | None

    @property
    def with_swap(self) -> int | None:
        """The most that can be had, slowly."""
        return None if self.total is None else self.total + (self.swap or 0)


def read_memory() -> Memory:
    """The memory of this machine, as far as the limits of a container allow it."""
    machine = _read_sizes(_PROC / "meminfo")
    total, available = [_physical_memory()], [machine.get("MemAvailable")]
    swap = [machine.get("SwapTotal")]
    for group in _control_groups():
        limit = _read_size(group / "memory.max")
        if limit is not None:
            # Pages of files that nobody has used for long are freed where they are in the way.
            kept = _read_sizes(group / "memory.stat").get("inactive_file", 0)
            used = (_read_size(group / "memory.current") or 0) - kept
            total.append(limit)
            available.append(max(limit - used, 0))
        swap.append(_read_size(group / "memory.swap.max"))
    return Memory(_least(total), _least(available), _least(swap))


def peak_memory() -> int | None:
    """The most bytes of memory that this process has had; None where the system does not tell."""
    return _read_sizes(_PROC / "self" / "status").get("VmHWM")


def resident_memory() -> int | None:
    """Bytes of memory that this process has now; None where the system does not tell."""
    return _read_sizes(_PROC / "self" / "status").get("VmRSS")


def _physical_memory() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _control_groups() -> Iterator[Path]:
    """The folders of this process's control group and of those around it, in version 2.

    Inside a container the outermost one is the container's own.
    """
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("0::/"):
            own = _CONTROL_GROUPS / line.removeprefix("0::/")
            yield from (own, *(g for g in own.parents if g.is_relative_to(_CONTROL_GROUPS)))


def _read_size(path: Path) -> int | None:
    """The number that a file holds: None where there is none, or "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_sizes(path: Path) -> dict[str, int]:
    """The sizes in a file of the kernel, one a line, in bytes."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    sizes = {}
    for line in lines:
        name, value, *unit = [*line.replace(":", " ").split(), "", ""][:3]
        if value.isdigit():
            sizes[name] = int(value) * (1024 if unit == ["kB"] else 1)
    return sizes


def _least(sizes: Iterable[int | None]) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def describe_machine(packages: Iterable[str]) -> dict[str, Any]:
    """What figures were measured on, and how busy it was; versions of the packages that count.

    Raises `importlib.metadata.PackageNotFoundError` for a package that is not installed.
    """
    cpu = describe_cpu()
    return {
        "cpu": cpu["name"],
        "instruction_sets": cpu["instruction_sets"],
        "cores": os.cpu_count(),
        "memory_bytes": read_memory().total,
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }
