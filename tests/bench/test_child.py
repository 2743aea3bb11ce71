"""Child processes take no module from the current folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fluxdeploy
from fluxdeploy.bench.child import child_environment, module_command
from fluxdeploy.bench.peers.conversion import convert_in_process
from fluxdeploy.errors import EngineError

MODULES = ("json", "numpy", "fluxdeploy", "engines", "runpy", "typing", "PIL")


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, full of modules that leave a trace when they are imported."""
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'a')\n")
    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'a')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "trace"


def start(module: str, *arguments: str, safe: bool) -> subprocess.CompletedProcess[str]:
    """Run a module of ours. Without `safe` as in Python 3.10, which knows no safe path."""
    command, environment = module_command(module, *arguments), child_environment()
    if not safe:
        del environment["PYTHONSAFEPATH"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("paths", "safe"),
    [
        (None, True),
        (None, False),
        ("", False),
        (":", False),
        ("{folder}:", True),
        (":{folder}", False),
        ("{folder}::{folder}", False),
    ],
)
def test_nothing_in_the_current_folder_is_imported(
    trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: str | None, safe: bool
) -> None:
    """With PYTHONPATH as shells leave it where it was empty before, too."""
    kept = tmp_path / "kept"
    kept.mkdir()
    if paths is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", paths.format(folder=kept))
    done = start("fluxdeploy.bench.worker", '{"contender": "none"}', safe=safe)
    assert done.stdout.startswith('{"error": "", "message": "TypeError: Job')
    assert not trap.exists()
    if paths is not None and "folder" in paths:
        assert str(kept) in child_environment()["PYTHONPATH"].split(os.pathsep)


def test_a_module_gets_its_arguments_and_our_package(trap: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/shown.py").write_text(
        "import sys, fluxdeploy; print(__name__, sys.argv[1:], fluxdeploy.__file__, sys.path)"
    )
    environment = child_environment()
    environment["PYTHONPATH"] += f"{os.pathsep}{tmp_path / 'elsewhere'}"
    done = subprocess.run(
        module_command("shown", "a b", "-c", ""),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"__main__ ['a b', '-c', ''] {fluxdeploy.__file__} [")
    assert "''" not in done.stdout.partition("] ")[2]
    assert f"'{tmp_path}'" not in done.stdout
    assert not trap.exists()


def test_a_conversion_takes_nothing_from_the_current_folder(trap: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"it cannot; it said: .*No module named '?nothing"):
        convert_in_process("nothing", "checkpoint", tmp_path / "out", "it cannot")
    assert not trap.exists()


def test_the_installed_command_takes_nothing_from_the_current_folder(trap: Path) -> None:
    """The script's own folder comes first there, as it does for every installed command."""
    script = Path(sys.executable).with_name("fluxdeploy")
    if not script.is_file():
        pytest.skip("fluxdeploy is not installed here")
    environment = {k: v for k, v in child_environment().items() if k != "PYTHONSAFEPATH"}
    subprocess.run([script, "doctor", "--help"], env=environment, check=True, capture_output=True)
    assert not trap.exists()
