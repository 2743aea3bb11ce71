"""What memory this machine has, and what a container leaves of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from fluxdeploy import machine
from fluxdeploy.machine import Memory, peak_memory, read_memory

GIB = 1 << 30
MEMINFO = f"""MemTotal:       {16 * GIB // 1024} kB
MemFree:         {2 * GIB // 1024} kB
MemAvailable:   {10 * GIB // 1024} kB
SwapTotal:       {4 * GIB // 1024} kB
HugePages_Total:       0
"""


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 GiB, 10 of them available, and 4 of swap."""
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_physical_memory", lambda: 16 * GIB)
    write(tmp_path, {"proc/meminfo": MEMINFO})


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.usefixtures("pretend")
def test_the_machines_own_memory(tmp_path: Path) -> None:
    assert read_memory() == Memory(16 * GIB, 10 * GIB, 4 * GIB)
    assert read_memory().with_swap == 20 * GIB
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "groups/memory.max": "max\n"})
    assert read_memory() == Memory(16 * GIB, 10 * GIB, 4 * GIB), "a group without a limit"


@pytest.mark.usefixtures("pretend")
def test_a_containers_limit_counts_with_what_is_used_of_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "groups/memory.max": f"{8 * GIB}\n",
            "groups/memory.current": f"{5 * GIB}\n",
            "groups/memory.stat": f"anon {2 * GIB}\ninactive_file {1 * GIB}\n",
            "groups/memory.swap.max": "0\n",
        },
    )
    assert read_memory() == Memory(8 * GIB, 4 * GIB, 0)


@pytest.mark.usefixtures("pretend")
def test_the_least_of_nested_limits_counts(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/old\n0::/outer/inner\n",
            "groups/outer/memory.max": f"{12 * GIB}",
            "groups/outer/memory.current": f"{11 * GIB}",
            "groups/outer/inner/memory.max": f"{6 * GIB}",
            "groups/outer/inner/memory.current": f"{1 * GIB}",
        },
    )
    assert read_memory() == Memory(6 * GIB, 1 * GIB, 4 * GIB)


@pytest.mark.usefixtures("pretend")
def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc" / "meminfo").unlink()
    monkeypatch.setattr(machine, "_physical_memory", lambda: None)
    assert read_memory() == Memory(None, None, None)
    assert read_memory().with_swap is None
    assert peak_memory() is None


@pytest.mark.usefixtures("pretend")
def test_the_peak_is_in_bytes(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/status": "Name:\tpython\nVmHWM:\t    2048 kB\n"})
    assert peak_memory() == 2 << 20
