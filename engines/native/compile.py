"""Kernels from their source to cubins for Hopper, on a machine that need not have a GPU.

Triton works in processes of their own, several side by side: it prints what it thinks of a kernel
that it does not compile, and of itself when it ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.native.sizes import PROCESSES
from engines.native.specs import Kernel, KernelSpec, schedule
from fluxdeploy.errors import EngineError, MissingDependencyError
from fluxdeploy.machine import usable_cpus

if TYPE_CHECKING:
    from engines.native.plan import Plan
    from fluxdeploy.progress import Progress, Task

__all__ = ["compile_kernels"]


def compile_kernels(plan: Plan, progress: Progress) -> dict[str, tuple[Kernel, bytes]]:
    """The kernels of a plan's steps with their cubins, by `KernelSpec.name`.

    Raises `EngineError` where the compiler refuses, and `MissingDependencyError` without Triton.
    """
    specs = list({spec.name: spec for work in schedule(plan) for spec in work.specs}.values())
    task = progress.task("  transformer: compiling kernels", total=len(specs))
    count = min(usable_cpus(), len(specs), PROCESSES)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(count) as pool:
        shares = [_Share(specs[index::count], Path(folder), task) for index in range(count)]
        try:
            made = [each for kernels in pool.map(_Share.run, shares) for each in kernels]
        finally:
            for share in shares:
                share.stop()
    task.finish()
    return {kernel.name: (kernel, cubin) for kernel, cubin in made}


class _Share:
    """Some kernels, which one process compiles."""

    def __init__(self, specs: Sequence[KernelSpec], folder: Path, task: Task) -> None:
        self._specs, self._folder, self._task = specs, folder, task
        self._process: subprocess.Popen[str] | None = None

    def run(self) -> list[tuple[Kernel, bytes]]:
        root = Path(__file__).parents[2]
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        with subprocess.Popen(
            [sys.executable, "-m", "engines.native.compiler", str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        ) as process:
            self._process = process
            assert process.stdin is not None
            assert process.stdout is not None
            json.dump([asdict(spec) for spec in self._specs], process.stdin)
            process.stdin.close()
            made = [self._result(json.loads(line)) for line in process.stdout]
        if len(made) < len(self._specs):
            name = self._specs[len(made)].function
            raise EngineError(
                f"Triton ended with code {process.returncode} while compiling {name}."
            )
        return made

    def _result(self, found: dict[str, Any]) -> tuple[Kernel, bytes]:
        if "missing" in found:
            raise MissingDependencyError(found["missing"])
        if "failure" in found:
            raise EngineError(found["failure"])
        kernel = Kernel.from_json(found)
        self._task.advance(1)
        return kernel, (self._folder / kernel.name).read_bytes()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
