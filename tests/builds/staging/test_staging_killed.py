"""A build that is killed at any moment leaves the earlier bundle or the new one, never half."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluxdeploy.bundle import open_bundle

SCRIPT = Path(__file__).with_name("staged_build.py")
REPOSITORY = SCRIPT.parents[3]


def _start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def _tree(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("swap", ["exchange", "rename"])
@pytest.mark.parametrize("previous", ["none", "earlier"])
def test_killed_before_every_single_change_to_the_disk(
    tmp_path: Path, previous: str, swap: str
) -> None:
    with _start("sweep", tmp_path, previous, swap) as process:
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert int(output) > 40


def test_killed_at_random_moments_the_rerun_gives_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(b"weights" * 1000)
    allowed = {}
    for version in ("1", "2"):
        with _start("build", tmp_path / version, checkpoint, version) as process:
            assert process.stdout is not None
            process.stdout.readline()
            started = time.perf_counter()
            assert process.wait(60) == 0
            duration = time.perf_counter() - started
        allowed[version] = _tree(tmp_path / version)
    source = random.Random(11)
    destination = tmp_path / "out" / "bundle"
    kills, version = 0, "1"
    for _ in range(200):
        with _start("build", destination, checkpoint, version) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(source.uniform(0, duration))
            process.kill()
            ended = process.wait(60) == 0
        kills += not ended
        if destination.exists():
            open_bundle(destination, check="all")
            assert _tree(destination) in allowed.values()
        if ended:
            assert _tree(destination) == allowed[version]
            version = "2" if version == "1" else "1"
        if kills == 25:
            break
    with _start("build", destination, checkpoint, version) as process:
        assert process.wait(60) == 0
    assert _tree(destination) == allowed[version]
    assert os.listdir(destination.parent) == ["bundle"]
