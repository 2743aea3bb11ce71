"""What the pages tell to type works, against the default bundle."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fluxdeploy.cli import COMMANDS, main
from tests.docs.pages import PAGES, ROOT, code_blocks, name_of

README = ROOT / "README.md"
RUN = ROOT / "docs" / "run.md"
SERVING = ROOT / "docs" / "serving.md"

CHECKPOINTS = {
    "./FLUX.1-dev": "demo:dev",
    "flux1-dev.safetensors": "demo:dev",
    "black-forest-labs/FLUX.1-schnell": "demo:dev",
    "./my-flux": "demo:dev",
}
"""The pages' checkpoints, by the name of one that comes with the package."""

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

_ADDRESS = "http://localhost:8000"

NOT_RUN = ("build", "refit", "serve", "tune")
"""Only parsed: the fixture of the default bundle is a build, and tests/parity builds others; a
server goes on, and tests/serve has its own; `tune` and `refit` would write into the fixture, and
tests/verify and tests/lora have their own."""


def command_lines(page: Path) -> list[list[str]]:
    lines = "\n".join(code_blocks(page, "sh")).splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("fluxdeploy ")]
    return [line[1:] for line in words]


LINES = [(page, line) for page in PAGES for line in command_lines(page)]
PYTHON = [
    (page, number)
    for page in (README, RUN, SERVING)
    for number in range(len(code_blocks(page, "python")))
]


@pytest.fixture
def workplace(tmp_path: Path, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the default bundle under the names that the pages use."""
    for name in ("bundle", "flux-dev", "bundle-rtx"):
        (tmp_path / name).symlink_to(demo_bundle, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_shows_every_command() -> None:
    assert {line[0] for line in command_lines(README)} == set(COMMANDS)


@pytest.mark.parametrize(
    ("page", "line"), LINES, ids=[f"{name_of(page)}: {' '.join(line)}" for page, line in LINES]
)
def test_every_command_line_is_one_that_the_command_takes(page: Path, line: list[str]) -> None:
    name, *arguments = line
    # A command keeps the help option that its first context gives it.
    group = click.Context(main, info_name="fluxdeploy", **main.context_settings)
    command = main.get_command(group, name)
    assert command is not None
    command.make_context(name, arguments, parent=group)


@pytest.mark.parametrize(
    ("page", "written"),
    [
        ("README.md", ["sheet.png", "image-1.png", "star.png", "flux-onnx/transformer.onnx"]),
        ("docs/run.md", ["sheet.png", "fox-1.png", "ring.png", "green.png"]),
        ("docs/build.md", ["flux-onnx/transformer.onnx"]),
        ("docs/triton.md", ["model_repository/run.sh"]),
    ],
)
def test_the_command_lines_run(
    workplace: Path, checkpoint: Callable[..., Path], page: str, written: list[str]
) -> None:
    # tests/exporters export the same, and its trace is remembered.
    exported = dict.fromkeys(CHECKPOINTS, str(checkpoint("dev")))
    for line in command_lines(ROOT / page):
        if line[0] in NOT_RUN:
            continue
        names = exported if line[0] == "export" else CHECKPOINTS
        arguments = [names.get(word, word) for word in line] + SMALL.get(line[0], [])
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, f"{line}: {result.output}"
    for path in written:
        assert (workplace / path).is_file(), path


def test_the_pages_whose_command_lines_run_are_all_that_have_some() -> None:
    assert {name_of(page) for page, _ in LINES} == {
        "README.md",
        *(f"docs/{name}.md" for name in ("build", "family", "run", "serving", "triton")),
    }


@pytest.mark.parametrize(
    ("page", "number"), PYTHON, ids=[f"{name_of(page)}[{number}]" for page, number in PYTHON]
)
def test_the_python_examples_run(
    page: Path, number: int, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = code_blocks(page, "python")[number]
    with _server(workplace) if _ADDRESS in code else nullcontext(_ADDRESS) as address:
        code = code.replace(_ADDRESS, address)
        exec(compile(code, f"{name_of(page)}[{number}]", "exec"), {})
    shown = capsys.readouterr().out
    there = {path.name for path in workplace.glob("*.png")}
    stopped = "step 3" in shown and "step 4" not in shown and "no picture was made" in shown
    expected = {
        ("README.md", 0): there == {"picture.png", "again.png"},
        ("README.md", 1): stopped,
        ("docs/run.md", 0): there == {f"picture-{index}.png" for index in range(4)},
        ("docs/run.md", 1): there == {"heart.png"},
        ("docs/run.md", 2): there == {"star.png"},
        ("docs/run.md", 3): there == {"wide.png"},
        ("docs/run.md", 4): shown.strip() == "(1, 128, 128, 3) float32",
        ("docs/run.md", 5): shown.strip()
        in (
            "{'a green ring': 'drawn', 'a red star': 'cancelled'}",
            "{'a red star': 'cancelled', 'a green ring': 'drawn'}",
        ),
        ("docs/run.md", 6): shown.strip() == "4 steps",
        ("docs/serving.md", 0): shown.startswith("iVBORw0KGgo"),
        ("docs/serving.md", 1): there == {"after-5.png", "after-14.png", "ring.png"},
    }
    assert expected[name_of(page), number], shown


@contextmanager
def _server(workplace: Path) -> Iterator[str]:
    """A server over the default bundle."""
    pytest.importorskip("openai")
    from fluxdeploy import FluxPipeline
    from fluxdeploy.serve.images_api.server import local_backend
    from fluxdeploy.serve.images_api.settings import Settings
    from tests.serve.conftest import running

    with FluxPipeline.from_bundle(workplace / "bundle") as pipe:
        backend = local_backend(pipe)
        with running(backend, Settings("demo")) as address:
            yield address


def test_the_errors_are_those_of_the_code() -> None:
    from fluxdeploy import errors
    from tests.docs.pages import section, tables

    classes, codes = tables(section(RUN, "## Errors"))
    assert {"FluxDeployError", *(row[0] for row in classes)} == set(errors.__all__)
    assert [row[0] for row in codes] == ["0", "1", "2", "130"]


def test_the_commands_are_those_of_the_code() -> None:
    from tests.docs.pages import section, tables

    (table,) = tables(section(RUN, "## Command line"))
    assert [row[0] for row in table] == list(COMMANDS)
