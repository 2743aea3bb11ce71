"""What this machine is, for `doctor` and for everything that records a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["available_memory", "describe_cpu", "describe_machine"]

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
    cores = os.cpu_count() or 1
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
    return {
        "name": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "instruction_sets": [name for name in _CPU_FEATURES if name in flags],
    }


def available_memory() -> int | None:
    """Bytes of memory that a new process can have; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    value = fields.get("MemAvailable", "").split()
    return int(value[0]) * 1024 if value else None


def describe_machine(packages: Iterable[str]) -> dict[str, Any]:
    """What figures were measured on, and how busy it was; versions of the packages that count.

    Raises `importlib.metadata.PackageNotFoundError` for a package that is not installed.
    """
    cpu = describe_cpu()
    return {
        "cpu": cpu["name"],
        "instruction_sets": cpu["instruction_sets"],
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }
