"""What the README tells to type works, against the default bundle."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fluxdeploy.cli import COMMANDS, main
from tests.docs.pages import ROOT, code_blocks

README = ROOT / "README.md"

CHECKPOINTS = {
    "./FLUX.1-dev": "demo:dev",
    "flux1-dev.safetensors": "demo:dev",
    "black-forest-labs/FLUX.1-schnell": "demo:dev",
}
"""The README's checkpoints, by the name of one that comes with the package."""

SMALL = {
    "generate": ["--width", "64", "--height", "48", "--steps", "2"],
    "bench": [
        "--size",
        "64x48",
        "--steps",
        "1",
        "--rounds",
        "1",
        "--warmup",
        "0",
        "--cold-starts",
        "0",
    ],
}
"""Options added to a command, so that it takes seconds; the last one of a kind counts."""

NOT_RUN = ("build",)
"""Only parsed: the fixture of the default bundle is a build, and tests/parity builds others."""


def command_lines() -> list[list[str]]:
    lines = "\n".join(code_blocks(README, "sh")).splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("fluxdeploy ")]
    return [line[1:] for line in words]


@pytest.fixture
def workplace(tmp_path: Path, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the default bundle under the names that the README uses."""
    for name in ("bundle", "flux-dev"):
        (tmp_path / name).symlink_to(demo_bundle, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_shows_every_command() -> None:
    assert {line[0] for line in command_lines()} == set(COMMANDS)


@pytest.mark.parametrize("line", command_lines(), ids=" ".join)
def test_every_command_line_is_one_that_the_command_takes(line: list[str]) -> None:
    name, *arguments = line
    command = main.get_command(click.Context(main), name)
    assert command is not None
    command.make_context(name, arguments, parent=click.Context(main))


def test_the_command_lines_run(workplace: Path) -> None:
    for line in command_lines():
        if line[0] in NOT_RUN:
            continue
        arguments = [CHECKPOINTS.get(word, word) for word in line] + SMALL.get(line[0], [])
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, f"{line}: {result.output}"
    assert (workplace / "image.png").is_file()
    assert (workplace / "fox-1.png").is_file()
    assert (workplace / "flux-onnx" / "transformer.onnx").is_file()


@pytest.mark.parametrize("number", range(len(code_blocks(README, "python"))))
def test_the_python_examples_run(
    number: int, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(code_blocks(README, "python")[number], f"README.md[{number}]", "exec"), {})
    shown = capsys.readouterr().out
    expected = {
        0: lambda: len(list(workplace.glob("picture-*.png"))) == 4,
        1: lambda: "step 3" in shown and "step 4" not in shown and "Interrupted" in shown,
        2: lambda: shown.strip() == "(1, 128, 128, 3) float32",
    }
    assert expected[number](), shown
