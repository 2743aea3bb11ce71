"""`fluxdeploy plan`: figures before any work, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch")

from fluxdeploy.build.plan import planner
from fluxdeploy.cli import main
from fluxdeploy.machine import Memory


def run(folder: Path, *args: str) -> Result:
    return CliRunner().invoke(
        main,
        ["plan", *args, "--out", str(folder / "bundle")],
        prog_name="fluxdeploy",
        env={"COLUMNS": "220"},
    )


def test_without_options_it_plans_the_default_model(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    for name in ("clip", "t5", "conditioner", "transformer", "vae_decoder", "vae_encoder"):
        assert f"{name} " in result.stdout
    for heading in ("disk", "memory to build", "memory to run", "--low-vram"):
        assert heading in result.stdout
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_json_is_one_object(tmp_path: Path) -> None:
    result = run(
        tmp_path, "--json", "--runtime", "tensorrt-rtx", "--target", "sm89", "--precision", "fp8",
        "--max-size", "512x256", "--max-batch", "3",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["runtime"], report["targets"]) == ("tensorrt-rtx", ["sm89"])
    disk = report["disk"]
    parts = disk["written"] + disk["copied"] + disk["engines"] + disk["other"]
    assert disk["needed"] == parts < disk["free"]
    assert report["largest"] == {"batch": 3, "text": 20, "image": 512, "steps": 28}
    transformer = next(c for c in report["components"] if c["name"] == "transformer")
    assert (transformer["precision"], transformer["compute"]) == ("fp8", "bf16")
    assert transformer["engine"] > transformer["written"] > 4e6
    assert report["problems"] == []


def test_the_impossible_is_told_with_exit_code_1(tmp_path: Path) -> None:
    options = ("--runtime", "tensorrt-rtx", "--target", "sm86", "--precision", "fp8")
    result = run(tmp_path, *options)
    assert result.exit_code == 1
    assert "Cannot be built: conditioner, transformer: sm86 (Ampere) has no FP8" in result.stdout
    report = json.loads(run(tmp_path, *options, "--json").stdout)
    assert "no FP8" in report["problems"][0]


def test_little_memory_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "read_memory", lambda: Memory(64 << 30, 100 << 20, 0))
    result = run(tmp_path)
    assert result.exit_code == 0
    assert "Note: the build needs" in result.stdout


def test_unknown_targets_are_usage_errors(tmp_path: Path) -> None:
    result = run(tmp_path, "--target", "sm99")
    assert result.exit_code == 2
    assert "sm99" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--precision", "int8"),
        ("--runtime", "tensorrt-rtx", "--target", "sm89", "--precision", "fp8"),
        ("--runtime", "openvino", "--precision", "bf16"),
        ("--max-size", "2048", "--max-batch", "16"),
    ],
)
def test_it_can_be_read_at_80_columns(options: tuple[str, ...], tmp_path: Path) -> None:
    arguments = ["plan", *options, "--out", str(tmp_path / "bundle")]
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, arguments, prog_name="fluxdeploy")
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in result.stdout
    for name in ("clip", "t5", "conditioner", "transformer", "vae_decoder", "vae_encoder"):
        rows = [line for line in lines if line.split() and line.split()[0] == name]
        assert len(rows) == 2, "a line on the disk, and one in memory"
    assert "On the disk, in MiB" in result.stdout
    assert "linked is what stays in the checkpoint's own files" in result.stdout
    assert "A call takes its memory besides the weights." in result.stdout
