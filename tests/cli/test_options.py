"""What options take: paths with `~`, sizes, and what the Tab key offers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.cli import COMMANDS, main
from fluxdeploy.cli.options import QUALITY_TYPE, SIZE, PathType
from fluxdeploy.demo import DEMO_CHECKPOINTS

ROOT = Path(__file__).parents[2]


def commands() -> dict[str, click.Command]:
    found = {name: main.get_command(click.Context(main), name) for name in COMMANDS}
    return {name: command for name, command in found.items() if command is not None}


PATHS = [
    pytest.param(name, parameter, id=f"{name} {parameter.name}")
    for name, command in commands().items()
    for parameter in command.params
    if isinstance(parameter.type, (click.Path, click.File))
]


def test_every_command_but_doctor_takes_a_path() -> None:
    assert {param.values[0] for param in PATHS} == COMMANDS.keys() - {"doctor"}


@pytest.mark.parametrize(("name", "parameter"), PATHS)
def test_home_is_meant_by_a_tilde(
    name: str, parameter: click.Parameter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert isinstance(parameter.type, PathType), "paths are of the one type"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").touch()
    ctx = click.Context(commands()[name])
    assert parameter.type.convert("~/x.txt", parameter, ctx) == tmp_path / "x.txt"


@pytest.mark.parametrize("name", ["build", "plan", "export", "verify", "bench"])
def test_a_checkpoint_may_lie_at_home(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    kind = next(p.type for p in commands()[name].params if p.name == "checkpoint")
    for given, meant in {
        "~/flux": f"{tmp_path}/flux",
        "demo:dev": "demo:dev",
        "acme/flux": "acme/flux",
        "./~flux": "./~flux",
        "/flux": "/flux",
    }.items():
        assert kind.convert(given, None, None) == meant


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", (512, 512)),
        ("1024x768", (768, 1024)),
        ("1024X768", (768, 1024)),
        (" 64 ", (64, 64)),
        ("16x16", (16, 16)),
    ],
)
def test_one_number_is_a_square(text: str, size: tuple[int, int]) -> None:
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "x", "512x", "x512", "-16", "1e3", "16x16x3", "5 12", "a"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="WIDTHxHEIGHT in pixels, such as 1024x768, or"):
        SIZE.convert(text, None, None)


def offered(*words: str) -> list[tuple[str, str]]:
    complete = ShellComplete(main, {}, "fluxdeploy", "_FLUXDEPLOY_COMPLETE")
    items = complete.get_completions(list(words[:-1]), words[-1])
    return [(item.type, item.value) for item in items]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("build", "--runtime", ""), {"auto", "onnxruntime", "openvino", "tensorrt-rtx"}),
        (("generate", "--runtime", "open"), {"openvino"}),
        (("verify", "--runtime", "e"), {"emulate"}),
        (("bench", "--runtime", "tensorrt-"), {"tensorrt-rtx"}),
        (("plan", "--target", "sm12"), {"sm120", "sm121"}),
        (("build", "--runtime", "openvino", "--target", ""), {"cpu"}),
        (("export", "--component", "vae"), {"vae_decoder", "vae_encoder"}),
        (("export", "--component-precision", "t"), {"t5=", "transformer="}),
        (("build", "--component-precision", "t5=fp3"), {"t5=fp32"}),
        (("build", "demo:"), set(DEMO_CHECKPOINTS)),
        (("verify", "--checkpoint", "demo:s"), {"demo:schnell"}),
        (("bench", "--against", "eager,openvino-"), {"eager,openvino-bf16"}),
    ],
)
def test_the_tab_key_offers_what_there_is(words: tuple[str, ...], values: set[str]) -> None:
    plain = {value for kind, value in offered(*words) if kind == "plain"}
    assert plain >= values
    assert all(value.startswith(words[-1]) for value in plain)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("build", "--out", "b"), "dir"),
        (("generate", "--bundle", ""), "dir"),
        (("bench", "--bundle", "x"), "dir"),
        (("generate", "--image", ""), "file"),
        (("build", "--calibration", ""), "file"),
        (("plan", "./F"), "file"),
        (("inspect", ""), "file"),
    ],
)
def test_the_shell_completes_paths(words: tuple[str, ...], kind: str) -> None:
    assert (kind, words[-1]) in offered(*words)


def test_components_are_those_of_the_exporters() -> None:
    pytest.importorskip("torch")
    from exporters.components.registry import COMPONENTS as DECLARED

    assert {value for _, value in offered("export", "--component", "")} == DECLARED.keys()


def test_completion_imports_nothing_slow() -> None:
    code = """
import os, sys
os.environ.update(
    _FLUXDEPLOY_COMPLETE="bash_complete", COMP_WORDS="fluxdeploy build --target sm", COMP_CWORD="3"
)
from fluxdeploy.cli import main
try:
    main(prog_name="fluxdeploy")
except SystemExit:
    print(*{"torch", "onnx", "onnxruntime", "openvino"} & sys.modules.keys(), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "plain,sm89" in done.stdout.split()
    assert done.stderr.split() == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("buidl", "build"),
        ("genrate", "generate"),
        ("Inspect", "inspect"),
        ("docter", "doctor"),
        ("benchmark", "bench"),
        ("exports", "export"),
    ],
)
def test_a_command_that_is_nearly_one(typed: str, meant: str) -> None:
    from click.testing import CliRunner

    result = CliRunner().invoke(main, [typed], prog_name="fluxdeploy")
    assert result.exit_code == 2
    assert f"There is no command {typed}" in result.stderr
    assert f"Did you mean {meant}" in result.stderr


def test_nothing_is_meant_by_a_word_of_another_kind() -> None:
    from click.testing import CliRunner

    result = CliRunner().invoke(main, ["xyzzy"], prog_name="fluxdeploy")
    assert "Did you mean" not in result.stderr
    assert all(name in result.stderr for name in COMMANDS)


@pytest.mark.parametrize(
    ("text", "promise"),
    [
        ("30", Promise(psnr=30.0)),
        (" 27.5 ", Promise(psnr=27.5)),
        ("cosine=0.995", Promise(cosine=0.995)),
        ("NONE", Promise()),
    ],
)
def test_a_quality_is_a_promise(text: str, promise: Promise) -> None:
    assert QUALITY_TYPE.convert(text, None, None) == promise


@pytest.mark.parametrize("text", ["", "high", "0", "101", "-5", "nan", "inf", "cosine=1", "psnr=3"])
def test_other_qualities_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="neither a PSNR from 1 to 100 dB"):
        QUALITY_TYPE.convert(text, None, None)
