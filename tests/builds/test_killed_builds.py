"""A build that dies at any moment leaves a whole bundle, and the next ones end as if it had not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.builds.conftest import REPOSITORY

KILLS = 35


def test_killed_and_interrupted_builds(
    tmp_path: Path,
    remembered_traces: Path,
    bundle: Callable[..., Path],
    checkpoints: Callable[..., Path],
) -> None:
    assert bundle("dev").is_dir()  # which needs the same traces: no build here waits for them
    sources = [checkpoints(scale=scale, name="dev") for scale in (1.0, 0.5)]
    arguments = [remembered_traces, tmp_path, KILLS, *sources]
    done = subprocess.run(
        [sys.executable, "-m", "tests.builds.killed_builds", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    report = json.loads(done.stdout)
    killed = {kind: sum(hits.values()) for kind, hits in report["killed"].items()}
    assert sum(killed.values()) == KILLS
    assert killed["random"] == 10
    hits = report["killed"]["aimed"]
    assert len([phase for phase, count in hits.items() if count]) > 10, hits
    assert len(report["interrupted"]) == 5
    for phase, code, output in report["interrupted"]:
        assert code == 130, (phase, output)
        *earlier, last = filter(None, output.splitlines())
        assert last == "Error: Interrupted; run the same command again to resume.", phase
        # What was finished before, as it is told where there is no terminal.
        assert all(re.fullmatch(r" *[\w: ()-]+: [\d.]+ s", line) for line in earlier), output
