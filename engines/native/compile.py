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
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.native.plan import typed
from engines.native.sizes import PROCESSES
from engines.native.specs import Kernel, KernelSpec
from engines.native.works import schedule
from fluxdeploy.errors import EngineError, MissingDependencyError
from fluxdeploy.machine import usable_cpus

if TYPE_CHECKING:
    from engines.native.plan import Plan
    from fluxdeploy.progress import Progress, Task

__all__ = ["compile_kernels"]

_TELLING = threading.Lock()
"""A task is not for several threads at a time."""


def compile_kernels(plan: Plan, progress: Progress) -> dict[str, tuple[Kernel, bytes]]:
    """The kernels of a plan's steps with their cubins, by `KernelSpec.name`.

    Raises `EngineError` where the compiler refuses, and `MissingDependencyError` without Triton.
    """
    specs = list({spec.name: spec for work in schedule(plan) for spec in work.specs}.values())
    task = progress.task("  transformer: compiling kernels", total=len(specs))
    count = min(usable_cpus(), len(specs), PROCESSES)
    made: dict[str, tuple[Kernel, bytes]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pool = stack.enter_context(ThreadPoolExecutor(count))
        # After the pool, so that no thread waits for a process that nobody wants any more.
        shares = [
            stack.enter_context(_Share(specs[index::count], folder, index, task))
            for index in range(count)
        ]
        for done in as_completed([pool.submit(share.run) for share in shares]):
            made |= done.result()
    task.finish()
    return {spec.name: made[spec.name] for spec in specs}


class _Share:
    """Some kernels, which one process compiles. A context manager, which ends the process."""

    def __init__(self, specs: Sequence[KernelSpec], folder: Path, index: int, task: Task) -> None:
        self._specs, self._folder, self._task = specs, folder, task
        self._log = folder / f"log.{index}"
        root = Path(__file__).parents[2]
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Safe: modules in the working directory would come before all others.
        environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "engines.native.compiler", str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=os.environ | environment,
                )
        except OSError as error:
            raise EngineError(
                f"No process for Triton can be started: {error.strerror or error}."
            ) from error

    def __enter__(self) -> _Share:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self) -> dict[str, tuple[Kernel, bytes]]:
        """The kernels by name. Raises as `compile_kernels` does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # Where nobody reads, the process has ended, as is told below.
        with suppress(BrokenPipeError), self._process.stdin as asked:
            json.dump([asdict(spec) for spec in self._specs], asked)
        with self._process.stdout as answers:
            made = dict(self._result(json.loads(line)) for line in answers)
        code = self._process.wait()
        if len(made) < len(self._specs):
            raise EngineError(
                f"Triton ended with code {code} while compiling {self._specs[len(made)].function}"
                f"{self._last_words()}. Each of its processes needs half a gigabyte of memory."
            )
        return made

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip().rstrip(".") for line in lines if line.strip()]
        return f" ({said[-1]})" if said else ""

    def _result(self, found: dict[str, Any]) -> tuple[str, tuple[Kernel, bytes]]:
        if "missing" in found:
            raise MissingDependencyError(found["missing"])
        if "failure" in found:
            raise EngineError(found["failure"])
        kernel = typed(Kernel, found, "kernel")
        with _TELLING:
            self._task.advance(1)
        return kernel.name, (kernel, (self._folder / kernel.name).read_bytes())
