"""Nothing of a library is printed on stdout while a command works."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

COMMAND = """
import ctypes, logging, os, subprocess, sys
from fluxdeploy.library_output import libraries_on_stderr

libc = ctypes.CDLL(None)
print("before")
with libraries_on_stderr():
    {work}
print("result")
"""

WORK = {
    "Python": "print('noise')",
    "a stream": "sys.stdout.write('noise')",
    "C, buffered": "libc.printf(b'noise')",
    "C, at once": "libc.puts(b'noise'); libc.fflush(None)",
    "the system": "os.write(1, b'noise')",
    "a child": "subprocess.run(['echo', 'noise'])",
    "a log": "logging.basicConfig(stream=sys.stdout); logging.error('noise')",
}


@pytest.mark.parametrize("work", WORK)
def test_what_is_printed_meanwhile_goes_to_stderr(work: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(work=WORK[work])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "before\nresult\n"
    assert "noise" in done.stderr


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_a_closed_stream_is_no_error(closed: str) -> None:
    command = f'"$0" -c "$1" {closed}'
    code = COMMAND.format(work="os.path.exists('x')").replace("print(", "str(")
    done = subprocess.run(["sh", "-c", command, sys.executable, code], cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["build", "export", "generate", "plan", "verify"])
def test_commands_that_use_libraries_work_so(name: str) -> None:
    module = importlib.import_module(f"fluxdeploy.cli.{name}")
    assert "libraries_on_stderr()" in inspect.getsource(module)
