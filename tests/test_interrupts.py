"""Ctrl-C at any moment: one line, code 130, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SLOW = """
import sys, time
print("importing", flush=True)
{how}
"""


def run(code: str, folder: Path, handler: object = signal.default_int_handler) -> tuple[int, str]:
    """Press Ctrl-C once `code` says that it is importing; the exit code, and stderr."""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ignored where the tests run as a shell's background job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),  # type: ignore[arg-type]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize(
    ("module", "how"),
    [
        ("click", "time.sleep(20)"),
        ("difflib", "while True: pass"),
        # As a library in C++ may, which sees an error that it does not know.
        ("errno_reader", "try: time.sleep(20)\nexcept BaseException: raise ImportError('failed')"),
        ("slow", "try: time.sleep(20)\nexcept BaseException: pass\ntime.sleep(20)"),
        ("slower", "class A:\n  def __del__(self): time.sleep(20)\nA()"),
    ],
)
@pytest.mark.parametrize("command", ["doctor", "build"])
def test_an_import_is_given_up_at_once(command: str, module: str, how: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(SLOW.format(how=how))
    if module in ("click", "difflib"):  # of the command line itself
        code = "from fluxdeploy.cli import main\nmain()"
    else:  # of a command
        code = f"""
import sys, types
from fluxdeploy.cli import main
import click
@click.command()
def command():
    import {module}
module = types.ModuleType("fluxdeploy.cli.{command}")
module.command = command
sys.modules["fluxdeploy.cli.{command}"] = module
sys.argv = ["fluxdeploy", "{command}"]
main(prog_name="fluxdeploy")
"""
    status, errors = run(code, tmp_path)
    assert status == 130, errors
    resumes = command == "build" and module not in ("click", "difflib")
    then = "; run the same command again to resume" if resumes else ""
    assert errors.strip() == f"Error: Interrupted{then}."


def test_who_ignores_ctrl_c_goes_on(tmp_path: Path) -> None:
    (tmp_path / "difflib.py").write_text(SLOW.format(how="time.sleep(1)"))
    code = "from fluxdeploy.cli import main\nmain(['--version'])"
    status, errors = run(code, tmp_path, signal.SIG_IGN)
    assert (status, errors) == (0, "")


def test_importing_the_command_line_leaves_the_handler() -> None:
    code = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import fluxdeploy.cli
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
signal.signal(signal.SIGINT, lambda *_: None)
own = signal.getsignal(signal.SIGINT)
import importlib
importlib.reload(fluxdeploy.cli)
assert signal.getsignal(signal.SIGINT) is own
"""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import signal\nsignal.signal(2, signal.default_int_handler){code}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
