"""Compiling kernels in processes of their own: what fails there is told here, and none is left."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.native.compile import compile_kernels
from engines.native.compiler import compile_spec
from engines.native.specs import KernelSpec, convert_spec, linear_spec
from engines.native.tiles import Tile
from engines.native.works import Work
from fluxdeploy.errors import EngineError
from fluxdeploy.progress import Progress, Task

SPEC = convert_spec("f32", "bf16", 64, 64, 64)


def compile_one(monkeypatch: pytest.MonkeyPatch, spec: KernelSpec) -> Any:
    """As if a plan had one step, which takes this kernel."""
    works = [Work((), (spec,))]
    monkeypatch.setattr("engines.native.compile.schedule", lambda plan: works)
    plan: Any = None
    return compile_kernels(plan, Progress(quiet=True))


def instead_of_python(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Let a shell's script be the compiler; its `$folder` is where cubins go."""
    program = folder / "compiler"
    program.write_text(f'#!/bin/sh\nfor folder in "$@"; do :; done\n{script}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize("reads", ["cat >/dev/null", "exec <&-"])
def test_a_process_that_dies_is_told_with_what_it_said_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reads: str
) -> None:
    """Whether it was asked yet or not."""
    script = f"{reads}\necho LLVM ERROR: no registers >&2\nkill -9 $$"
    instead_of_python(monkeypatch, tmp_path, script)
    # More than a pipe holds.
    spec = replace(SPEC, constants=dict(SPEC.constants) | {"NOTE": "x" * 200_000})
    with pytest.raises(EngineError, match=r"code -9 .* convert \(LLVM ERROR: no registers\)"):
        compile_one(monkeypatch, spec)


def test_a_process_that_cannot_be_started_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(EngineError, match="No process for Triton can be started: No such file"):
        compile_one(monkeypatch, SPEC)


def test_an_interrupt_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Such as comes while progress is shown; this one would go on for a minute."""
    kernel = '{"name": "k", "boxes": [], "tile": [1, 1], "function": "convert", "entry": "k"'
    kernel += ', "threads": 1, "shared": 0, "programs": 1}'
    script = f"cat >/dev/null\necho x > $folder/k\necho $$ > {tmp_path}/id\necho '{kernel}'"
    instead_of_python(monkeypatch, tmp_path, f"{script}\nexec sleep 60")

    def interrupt(task: Task, n: float = 1) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Task, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compile_one(monkeypatch, SPEC)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "id").read_text()), 0)


def test_what_triton_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    with pytest.raises(EngineError, match="Triton does not compile nothing for sm90"):
        compile_one(monkeypatch, replace(SPEC, function="nothing"))


def test_a_kernel_that_takes_too_much_shared_memory_is_refused() -> None:
    """The compiler makes it, and a launch would fail."""
    pytest.importorskip("triton")
    tile = Tile(128, 256, 8, 8)
    spec = linear_spec("bf16", "bf16", "bf16", 256, 1024, "plain", 0, False, False, False, tile)
    with pytest.raises(EngineError, match=r"linear .*TILE_COLUMNS.* needs \d+ bytes of shared"):
        compile_spec(spec)
