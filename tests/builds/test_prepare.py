"""What refuses a build before its work: `plan` says it too, since both ask `prepare`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch")

from fluxdeploy.build import build as builder
from fluxdeploy.build import prepare as module
from fluxdeploy.cli import main
from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.errors import ExportError

Prepared = Callable[[Path], tuple[str, ...]]
"""Makes what a command meets below a folder that holds a checkpoint, and returns its arguments."""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="fluxdeploy")


def out(path: str) -> Prepared:
    return lambda root: ("--out", str(root / path))


def _file(root: Path) -> tuple[str, ...]:
    (root / "bundle").write_text("mine")
    return ("--out", str(root / "bundle"))


def _below_a_file(root: Path) -> tuple[str, ...]:
    (root / "file").write_text("mine")
    return ("--out", str(root / "file/deeper/bundle"))


def _parent_is_a_file(root: Path) -> tuple[str, ...]:
    (root / "file").write_text("mine")
    return ("--out", str(root / "file/bundle"))


def _strangers(root: Path) -> tuple[str, ...]:
    (root / "bundle").mkdir()
    (root / "bundle/notes.txt").write_text("mine")
    return ("--out", str(root / "bundle"))


def _link_in_a_circle(root: Path) -> tuple[str, ...]:
    (root / "bundle").symlink_to(root / "bundle")
    return ("--out", str(root / "bundle/deeper"))


def _current(root: Path) -> tuple[str, ...]:
    (root / "here").mkdir()
    os.chdir(root / "here")
    return ("--out", ".")


def _around_the_current(root: Path) -> tuple[str, ...]:
    (root / "bundle/deeper").mkdir(parents=True)
    os.chdir(root / "bundle/deeper")
    return ("--out", str(root / "bundle"))


def _without(path: str) -> Prepared:
    def remove(root: Path) -> tuple[str, ...]:
        target = root / "checkpoint" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        return ("--out", str(root / "bundle"))

    return remove


def _broken(path: str, text: str) -> Prepared:
    def write(root: Path) -> tuple[str, ...]:
        (root / "checkpoint" / path).write_text(text)
        return ("--out", str(root / "bundle"))

    return write


def _calibration(name: str, data: bytes) -> Prepared:
    def write(root: Path) -> tuple[str, ...]:
        (root / name).write_bytes(data)
        target = ("--runtime", "tensorrt-rtx", "--target", "sm89", "--precision", "fp8")
        return ("--calibration", str(root / name), "--out", str(root / "bundle"), *target)

    return write


def _options(*options: str) -> Prepared:
    return lambda root: (*options, "--out", str(root / "bundle"))


CASES: dict[str, tuple[Prepared, str]] = {
    "a file": (_file, "is a file, not a folder"),
    "in a file": (_parent_is_a_file, "a file is in its place"),
    "below a file": (_below_a_file, "a part of this path is a file"),
    "strangers": (_strangers, "holds files and is not a bundle"),
    "a circle": (_link_in_a_circle, "symbolic links lead in a circle|a file is in its place"),
    "a long name": (out("x" * 250), "the name is too long"),
    "a mount point": (lambda root: ("--out", "/proc"), "is a mount point"),
    "the checkpoint": (out("checkpoint"), "overlap"),
    "in the checkpoint": (out("checkpoint/bundle"), "overlap"),
    "around the checkpoint": (lambda root: ("--out", str(root)), "overlap"),
    "the current folder": (_current, "cannot replace the current folder"),
    "around the current": (_around_the_current, "cannot replace the current folder"),
    "no tokenizer": (_without("tokenizer"), "tokenizer"),
    "no tokenizer_2": (_without("tokenizer_2"), "tokenizer_2"),
    "a broken tokenizer": (_broken("tokenizer/tokenizer.json", "{"), "tokenizer"),
    "an empty tokenizer": (_broken("tokenizer_2/tokenizer.json", "{}"), "tokenizer_2"),
    "a broken config": (_broken("vae/config.json", "[]"), "vae"),
    "no prompts": (_calibration("prompts.txt", b"\n \n"), "holds no prompt"),
    "no text": (_calibration("prompts.txt", b"\xff\xfe"), "is not UTF-8"),
    "no JSON": (_calibration("calibration.json", b"{"), "is not valid JSON"),
    "no ranges": (_calibration("calibration.json", b"{}"), "has no schema_version"),
    "no such file": (_options("--calibration", "/nowhere/at/all"), "does not exist"),
    "no scratch": (_options("--workspace", "0"), "--workspace"),
    "an odd size": (
        _options("--runtime", "tensorrt-rtx", "--target", "sm89", "--min-size", "100"),
        "multiples of 16",
    ),
    "two targets": (_options("--target", "cpu", "--target", "cuda"), "takes one --target"),
    "no such precision": (_options("--component-precision", "t5=fp8"), "t5"),
    "no such component": (_options("--component-precision", "t6=fp32"), "no component 't6'"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_build_is_refused_before_its_work(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # and back
    checkpoint = tmp_path / "root/checkpoint"
    shutil.copytree(DEMO_CHECKPOINTS["demo:dev"], checkpoint)
    prepared, words = CASES[case]
    arguments = (str(checkpoint), *prepared(checkpoint.parent))
    there = sorted((tmp_path / "root").rglob("*"))
    planned = run("plan", *arguments)
    assert planned.exit_code != 0
    said = " ".join(planned.output.split())
    assert any(word in said for word in words.split("|")), said
    assert sorted((tmp_path / "root").rglob("*")) == there, "nothing is written"


@pytest.mark.parametrize("case", ["a file", "a long name", "strangers", "no scratch", "no text"])
def test_plan_and_build_use_the_same_words(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    arguments = CASES[case][0](tmp_path)
    planned, built = run("plan", *arguments), run("build", *arguments)
    assert built.stderr.partition("Error: ")[2] == planned.stderr.partition("Error: ")[2] != ""
    assert built.exit_code == planned.exit_code


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    arguments = ("--out", str(tmp_path / "locked/bundle"))
    planned, built = run("plan", *arguments), run("build", *arguments)
    assert planned.exit_code == built.exit_code == 1
    assert planned.stderr == built.stderr
    assert "permission is denied" in planned.stderr


def test_both_commands_settle_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def prepare(*arguments: object) -> None:
        asked.append(arguments)
        raise ExportError("enough")

    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(builder, "prepare", prepare)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox")
    options = (
        *("demo:schnell", "--precision", "int8", "--component-precision", "t5=fp32"),
        *("--calibration", str(prompts), "--runtime", "onnxruntime", "--target", "cpu"),
        *("--min-size", "64", "--opt-size", "128x64", "--max-size", "256", "--max-batch", "3"),
        *("--workspace", "100", "--weight-streaming", "--replace", "--out", str(tmp_path / "x")),
    )
    for name in ("plan", "build"):
        assert "enough" in run(name, *options).stderr
    assert asked[0] == asked[1]
