"""The watch over a reader sees what it is for: without that, a fuzzer proves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def watched(scratch: Path, work: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import os, shutil, subprocess, time\nfrom pathlib import Path\n"
        "from tests.fuzz.watch import Watch\n"
        f"watch = Watch(Path({str(scratch)!r}), 0.5, 300 << 20)\nwatch.begin()\n"
        f"with watch.example():\n    {work}\n"
        "print(watch.outside)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=scratch,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "work",
    [
        "open('/etc/hostname').read()",
        "Path('../x').write_text('')",
        "os.symlink('/etc', '../link')",
        "Path('link').symlink_to('/etc'); open('link/hostname').read()",
        "open('/dev/full', 'w').close()",
        "subprocess.run(['true'])",
    ],
)
def test_what_is_done_outside_is_told(tmp_path: Path, work: str) -> None:
    (tmp_path / "scratch").mkdir()
    done = watched(tmp_path / "scratch", work)
    assert done.returncode == 0, done.stderr
    assert done.stdout != "[]\n"


def test_work_inside_is_not_told(tmp_path: Path) -> None:
    work = (
        "Path('a').write_text(''); os.rename('a', 'b'); open('/proc/self/stat').read(); "
        "os.makedirs('c/d'); Path('c/d/e').touch(); shutil.rmtree('c')"
    )
    assert watched(tmp_path, work).stdout == "[]\n"


def test_too_much_time_or_memory_ends_the_process(tmp_path: Path) -> None:
    # The interpreter's lock is held: no signal would be heard.
    slow = watched(tmp_path, "pow(3, 10**8)")
    assert slow.returncode == 1
    assert "Timeout" in slow.stderr
    large = watched(tmp_path, "bytearray(1 << 30)")
    assert large.returncode == 1
    assert "MemoryError" in large.stderr
