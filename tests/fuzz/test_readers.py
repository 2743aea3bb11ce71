"""Damaged files end in an error of ours: soon, in little memory, and without another file touched.

A few inputs for each reader; `pytest tests/fuzz --fuzz-examples 10000` gives it as many, each
reader in a process of its own, and prints the figures with `-s`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

from tests.fuzz.readers import READERS

ROOT = Path(__file__).parents[2]
RUN = Path(__file__).with_name("run_readers.py")

AT_ONCE = 1000
"""Inputs for one process: its memory is bounded, and hypothesis remembers what it tried."""

FEW = {"tokenizer_folder": 4, "ranges": 8, "arguments": 12}
"""Inputs where a reader takes long for each."""

WITH_TORCH = (
    "gguf", "four_bits", "prompts", "checkpoint", "tokenizer_folder", "ranges", "arguments",
    "emulated_graph",
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "examples" not in metafunc.fixturenames:
        return
    many = metafunc.config.getoption("fuzz_examples")
    groups = {
        "host": [name for name in READERS if name not in WITH_TORCH],
        "torch": list(WITH_TORCH),
    }
    if many:
        groups = {name: [name] for name in READERS}
    metafunc.parametrize(
        "examples",
        [{name: many or FEW.get(name, 20) for name in names} for names in groups.values()],
        ids=list(groups),
    )


def test_damaged_input_is_read_or_refused(tmp_path: Path, examples: dict[str, int]) -> None:
    if examples.keys() & set(WITH_TORCH):
        pytest.importorskip("transformers")
    for seed in range(1, math.ceil(max(examples.values()) / AT_ONCE) + 1):
        counts = [f"{name}={min(count, AT_ONCE)}" for name, count in examples.items()]
        done = subprocess.run(
            [sys.executable, RUN, tmp_path / str(seed), str(seed), *counts],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
                "RUST_BACKTRACE": "0",
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        print(done.stdout)
        figures = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert [found["reader"] for found in figures] == list(examples)
        assert all(found["slowest"] < 5 for found in figures)
