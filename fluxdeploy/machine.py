"""What this machine is, for `doctor` and for everything that records a measurement."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

__all__ = ["describe_cpu"]

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
