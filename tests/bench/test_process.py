"""A contender's process that is killed, as it is where memory runs out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fluxdeploy.bench.job import Job
from fluxdeploy.bench.process import ContenderProcess
from fluxdeploy.errors import EngineError

ANSWER = json.dumps({"laps": {"load": [1.0]}, "memory": None})
WORKER = f"import time; print({ANSWER!r}, flush=True); time.sleep(60)"


def test_a_killed_contender_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
        started.append(popen([sys.executable, "-c", WORKER], **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    job = Job("eager", "", "", str(tmp_path), "", "auto", "cpu", 1, "", 0, 16, 16, 1, 1.0, 1, 8)

    def use() -> None:
        with ContenderProcess("big", job) as contender:
            os.kill(started[0].pid, signal.SIGKILL)
            started[0].wait()
            contender.draw()

    with pytest.raises(EngineError, match=r"big ended with code -9.*memory may have run out"):
        use()
