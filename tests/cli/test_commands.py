"""What all commands have in common: help, its copy in the docs, and how failures end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner, Result

import fluxdeploy
from fluxdeploy.cli import COMMANDS, main, reference
from fluxdeploy.errors import BundleError, Cancelled, UsageError

ROOT = Path(__file__).parents[2]

OPTIONAL = ("torch", "transformers", "diffusers", "onnx", "onnx_ir", "onnxscript", "tensorrt_rtx")


class Panic(BaseException):
    """As the panic of a library in Rust is."""


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="fluxdeploy")


def run_failing(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, name: str = "doctor"
) -> Result:
    """Run `fluxdeploy NAME` with a command in its place that raises."""

    @click.command()
    def command() -> None:
        raise error

    module = ModuleType(f"fluxdeploy.cli.{name}")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"fluxdeploy.cli.{name}", module)
    return run(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_and_needs_no_optional_package(name: str) -> None:
    code = f"""
import sys
for package in {OPTIONAL!r}:
    sys.modules[package] = None
from fluxdeploy.cli import main
main([{name!r}, "--help"], prog_name="fluxdeploy")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    usage, _, rest = done.stdout.partition("\n\n")
    assert usage.startswith(f"Usage: fluxdeploy {name}")
    paragraphs = rest.partition("Examples:")
    assert len(paragraphs[0].split()) > 15, "a paragraph says what the command is for"
    assert f"fluxdeploy {name}" in paragraphs[2], "an example shows how it is called"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_group_help_lists_every_command_and_imports_none() -> None:
    code = """
import sys
from fluxdeploy.cli import COMMANDS, main
main(["--help"], prog_name="fluxdeploy", standalone_mode=False)
print(*sys.modules.keys() & {f"fluxdeploy.cli.{name}" for name in COMMANDS}, file=sys.stderr)
print(*{"numpy", "rich", "onnxruntime"} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.split() == []
    for name, text in COMMANDS.items():
        assert name in done.stdout
        assert text in done.stdout


def test_docs_hold_the_current_help() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == reference.render(), "docs/commands.md is stale: run `make docs`"


def test_version_is_printed() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"fluxdeploy {fluxdeploy.__version__}\n"


@pytest.mark.parametrize(
    "args", [["nonsense"], ["doctor", "--nonsense"], ["generate"], ["doctor", "extra"]]
)
def test_wrong_usage_exits_with_2(args: list[str]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BundleError("No bundle there."), 1, "Error: No bundle there."),
        (Cancelled("Stopped."), 1, "Error: Stopped."),
        (UsageError("513 tokens."), 2, "Error: 513 tokens."),
        (OSError(errno.ENOSPC, "No space", "x.onnx"), 1, "disk is full, so x.onnx could not"),
        (OSError(errno.ENOSPC, "No space"), 1, "disk is full, so a file could not"),
        (PermissionError(errno.EACCES, "Denied", "/root/x"), 1, "No permission to use /root/x"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "Error: No such file: x"),
        (OSError("odd"), 1, "Error: odd."),
        (MemoryError(), 1, "Memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "Memory ran out"),
        (RuntimeError("can't start new thread"), 1, "The system starts no more threads"),
        (KeyboardInterrupt(), 130, "Error: Interrupted."),
        (ZeroDivisionError("division by zero"), 1, "bug in fluxdeploy (ZeroDivisionError: div"),
        (Panic("index out of bounds"), 1, "bug in fluxdeploy (Panic: index out of bounds)"),
        (Panic(), 1, "bug in fluxdeploy (Panic: )"),
        (GeneratorExit("odd"), 1, "bug in fluxdeploy (GeneratorExit: odd)"),
        (click.Abort(), 130, "Error: Interrupted."),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Error: Broken pipe."),
    ],
)
def test_failures_end_in_one_message(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    result = run_failing(monkeypatch, error)
    assert result.exit_code == code
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_promises_to_resume_only_where_that_is_so(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    result = run_failing(monkeypatch, KeyboardInterrupt(), name)
    then = "; run the same command again to resume" if name in ("build", "refit") else ""
    assert result.stderr.strip() == f"Error: Interrupted{then}."


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), BundleError("No bundle.")])
def test_debug_adds_the_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setenv("FLUXDEPLOY_DEBUG", "1")
    result = run_failing(monkeypatch, error)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_a_reader_that_goes_away_causes_no_traceback() -> None:
    command = f"{sys.executable} -m fluxdeploy doctor --json | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""


def test_ctrl_c_ends_the_process_with_130() -> None:
    code = """
import signal, sys, time, types, click
# Ignored where the tests run as a shell's background job.
signal.signal(signal.SIGINT, signal.default_int_handler)
@click.command()
def command():
    print("ready", flush=True)
    time.sleep(60)
module = types.ModuleType("fluxdeploy.cli.doctor")
module.command = command
sys.modules["fluxdeploy.cli.doctor"] = module
from fluxdeploy.cli import main
main(["doctor"], prog_name="fluxdeploy")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.strip().startswith("Error: Interrupted")


def test_shell_completion_offers_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fluxdeploy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **os.environ,
            "_FLUXDEPLOY_COMPLETE": "bash_complete",
            "COMP_WORDS": "fluxdeploy ge",
            "COMP_CWORD": "1",
        },
    )
    assert done.stdout.split() == ["plain,generate"]
