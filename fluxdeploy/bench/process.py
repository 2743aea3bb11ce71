"""The command's side of a contender's process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fluxdeploy import errors
from fluxdeploy.bench.child import child_environment, module_command
from fluxdeploy.bench.clock import Laps
from fluxdeploy.bench.job import Job
from fluxdeploy.errors import EngineError, FluxDeployError

__all__ = ["ContenderProcess"]


class ContenderProcess:
    """Starts a contender, and lets it draw. A context manager; the process ends with it.

    name: the contender's, for errors. `cold_start` is the time in seconds from the start of the
    process to its first saved picture, `load` the part of it for opening the model, `memory` the
    process's peak in bytes (None where the system does not tell).

    Raises `EngineError` where it fails, with what it said, or the error that it raised itself.
    """

    def __init__(self, name: str, job: Job) -> None:
        self._name = name
        self._log = Path(job.folder) / "log.txt"
        began = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                module_command("fluxdeploy.bench.worker", json.dumps(asdict(job))),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(job.threads),
                text=True,
                # Ctrl-C is for the command, which ends its contenders itself.
                start_new_session=True,
            )
        try:
            first = self._read()
        except BaseException:
            self.close()
            raise
        self.cold_start = time.perf_counter() - began
        self.load = float(first["laps"]["load"][0])
        self.memory: int | None = first["memory"]

    def draw(self) -> Laps:
        """Draw once more."""
        answer = self._ask("draw")
        self.memory = answer["memory"]
        return {name: tuple(seconds) for name, seconds in answer["laps"].items()}

    def keep(self) -> None:
        """Have the numbers of the last picture written into the job's folder."""
        self._ask("keep")

    def close(self) -> None:
        """End the process and those that it started, at once. Calling it twice is harmless."""
        if self._process.poll() is None:
            # It leads a group of its own, see above.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                # What a process that was killed has not read is still to be written to it.
                with suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> ContenderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: reading finds out what it said
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise EngineError(
                f"{self._name} ended with code {self._process.returncode}{self._last_words()}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" not in answer:
            return answer
        kind = getattr(errors, answer["error"], None)
        if isinstance(kind, type) and issubclass(kind, FluxDeployError):
            raise kind(answer["message"])
        raise EngineError(f"{self._name} failed: {answer['message']}")

    def _last_words(self) -> str:
        """The last line that the process printed, where memory ran out there is none."""
        lines = self._log.read_text(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        if said:
            return f": {said[-1]}"
        return ". Its memory may have run out: close other programs, or ask for smaller pictures."


def _environment(threads: int) -> dict[str, str]:
    """The same number of threads for every library, and nothing from the network."""
    return {
        **child_environment(),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
