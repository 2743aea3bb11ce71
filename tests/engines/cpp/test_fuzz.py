"""Damaged files are read or refused by the C++ library: no crash, no hang, nothing outside opened.

A few hundred inputs; `--fuzz-examples N` gives as many. `make cpp-check` does so with sanitizers.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.engines.cpp.seeds import write_seeds


def test_damaged_files_are_read_or_refused(
    built: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    inputs = pytestconfig.getoption("fuzz_examples") or 400
    seeds = write_seeds(tmp_path / "seeds")
    done = subprocess.run(
        [built / "fluxdeploy-fuzz", seeds, tmp_path / "scratch", str(inputs)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    found = [
        tuple(map(int, pair)) for pair in re.findall(r"(\d+) read, (\d+) refused", done.stdout)
    ]
    assert sum(map(sum, found)) == inputs
    # What is never read, or never refused, tests nothing.
    assert len(found) == 4
    assert all(read and refused for read, refused in found)
