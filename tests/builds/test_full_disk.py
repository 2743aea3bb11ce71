"""A disk that fills up during a build, with a small file system of its own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from fluxdeploy.bundle import open_bundle
from fluxdeploy.cli import main
from tests.builds.conftest import tree

if TYPE_CHECKING:
    from tests.support.traces import Traces


def _mount(folder: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return (
        shutil.which("mount") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not _mount(folder, "size=64m"):
        pytest.skip("mounting a file system is not permitted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("planned", [True, False], ids=["foreseen", "in the middle"])
def test_a_full_disk(
    small_disk: Path,
    demo_bundle: Path,
    checkpoints: Callable[..., Path],
    traces: Traces,
    monkeypatch: pytest.MonkeyPatch,
    planned: bool,
) -> None:
    if not planned:
        # Another program may take the room that was there when the build began.
        monkeypatch.setattr("fluxdeploy.build.plan.Plan.require_possible", lambda plan: None)
    bundle = small_disk / "bundle"
    shutil.copytree(demo_bundle, bundle)
    before = tree(bundle)
    for room in (16, 200_000, 2_000_000, 6_000_000):
        used = shutil.disk_usage(small_disk).used
        assert _mount(small_disk, f"remount,size={used + room}")
        result = CliRunner().invoke(
            main, ["build", str(checkpoints(scale=0.5)), "--out", str(bundle)]
        )
        assert result.exit_code == 1, result.output
        message = result.stderr.splitlines()[-1]
        assert message.startswith("Error: ")
        if planned:
            assert "are free: free some space" in message
        else:
            assert "No space left on device" in message or "disk is full" in message
        assert "bug" not in message
        assert tree(bundle) == before
        open_bundle(bundle, check="all")
    assert _mount(small_disk, "remount,size=64m")
    result = CliRunner().invoke(main, ["build", str(checkpoints(scale=0.5)), "--out", str(bundle)])
    assert result.exit_code == 0, result.output
    assert tree(bundle).keys() == before.keys()
    assert tree(bundle) != before
    open_bundle(bundle, check="all")
