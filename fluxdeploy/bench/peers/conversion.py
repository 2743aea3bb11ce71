"""Work on a checkpoint in a process of its own, whose memory is then not the contender's."""

from __future__ import annotations

import subprocess
from pathlib import Path

from fluxdeploy.bench.child import child_environment, module_command
from fluxdeploy.errors import EngineError

__all__ = ["convert_in_process"]


def convert_in_process(module: str, checkpoint: str, destination: Path, failure: str) -> None:
    """Run the module with the arguments checkpoint and destination.

    Raises `EngineError` where it fails: `failure`, what it could not do, and its last words.
    """
    command = module_command(module, checkpoint, str(destination))
    done = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise EngineError(f"{failure}; it said: {said[-1]}")
