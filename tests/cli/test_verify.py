"""What `fluxdeploy verify` shows of a report: tables, JSON, a plot, and its exit code."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from engines import EngineOptions
from engines.golden import Deviation
from fluxdeploy.bundle.manifest import QualityRecord
from fluxdeploy.cli import main
from fluxdeploy.install import install_command
from fluxdeploy.verify import verify as module
from fluxdeploy.verify.layers import LayersReport
from fluxdeploy.verify.pictures import PictureReport, PicturesReport
from fluxdeploy.verify.verify import ComponentReport, VerifyReport

GATE = QualityRecord(18.0, 0.7, 15.0)
FEW = tuple(
    PictureReport("a cat", seed, 20.0 + seed, 0.9 + seed / 100, 9.5, seed > 0, True)
    for seed in range(3)
)
REPORT = VerifyReport(
    bundle_hash="0" * 64,
    components=(
        ComponentReport("transformer", "fp8", True, Deviation(0.05, 0.999, 40.0), True),
        ComponentReport("vae_decoder", "fp32", False, Deviation(0.0, 1.0, math.inf), True),
    ),
    pictures=PicturesReport(128, 96, 28, GATE, FEW),
    layers=LayersReport(
        {
            "transformer_blocks.0.attn.to_q": 31.0,
            "transformer_blocks.0.ff.net.2": 22.5,
            "transformer_blocks.1.attn.to_q": 33.0,
            "single_transformer_blocks.0.proj_mlp": 29.0,
            "single_transformer_blocks.0.proj_out": 34.0,
            "single_transformer_blocks.1.proj_out": 36.0,
        },
        15.0,
    ),
)
ALONE = replace(REPORT, pictures=None, layers=None)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`report["report"]` is what verifying gives; `report["pictures"]` what was asked for."""
    state: dict[str, Any] = {"report": REPORT}

    def verify(path: Path, checkpoint: str | None, *others: Any) -> VerifyReport:
        state["checkpoint"], state["options"], state["pictures"] = checkpoint, others[1], others[3]
        return state["report"]

    monkeypatch.setattr(module, "verify", verify)
    return state


def run(*arguments: object) -> Result:
    # Wide, so that no table breaks a line.
    return CliRunner(env={"COLUMNS": "120"}).invoke(main, ["verify", *map(str, arguments)])


def test_the_tables_show_spreads_and_thresholds(report: dict[str, Any]) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if "│" in line]
    shown = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert shown["PSNR"] == ["20.0 dB", "21.0 dB", "22.0 dB", "18 dB", "passed"]
    assert shown["SSIM"] == ["0.900", "0.910", "0.920", "0.7", "passed"]
    assert shown["objects right"] == ["", "67%", "", "PyTorch: 100%", ""]
    assert shown["transformer_blocks.0.ff.net.2"] == ["22.5 dB", "15 dB", "passed"]
    assert "single_transformer_blocks.1.proj_out" not in shown
    assert "3 pictures of 96x128 in 28 steps" in result.stdout
    assert report["pictures"] is None


def test_threads_and_the_gpu_are_passed_on(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.base.usable_cpus", lambda: 2)
    assert run("--device", 1, "--threads", 2).exit_code == 0
    assert report["options"] == EngineOptions(threads=2, device=1)
    assert run("--device", -1).exit_code == 2


def test_an_emulation_is_called_one(report: dict[str, Any]) -> None:
    assert "Emulated on this CPU are fp8 in transformer: the numbers are" in run().stdout
    assert json.loads(run("--json").stdout)["emulated"] is True
    others = [replace(REPORT.components[1], precision="bf16", emulated=True, name=n) for n in "ab"]
    report["report"] = replace(REPORT, components=(REPORT.components[0], *others))
    assert "are fp8 in transformer; bf16 in a, b: the numbers" in run().stdout
    components = tuple(replace(c, emulated=False) for c in REPORT.components)
    report["report"] = replace(REPORT, components=components)
    assert "emulated" not in run().stdout
    assert json.loads(run("--json").stdout)["emulated"] is False


@pytest.mark.parametrize("part", ["components", "pictures", "layers"])
def test_whatever_is_past_its_gate_fails(report: dict[str, Any], part: str) -> None:
    assert REPORT.pictures is not None
    assert REPORT.layers is not None
    failed = {
        "components": (replace(REPORT.components[0], passed=False),),
        "pictures": replace(REPORT.pictures, gate=replace(GATE, min_ssim=0.95)),
        "layers": replace(REPORT.layers, min_sqnr=25.0),
    }
    report["report"] = replace(REPORT, **{part: failed[part]})
    result = run()
    assert result.exit_code == 1
    assert result.stdout.count("FAILED") == 1
    result = run("--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False


def test_the_json_holds_everything_and_no_infinity(report: dict[str, Any]) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    equal = replace(FEW[0], psnr=math.inf)
    assert REPORT.pictures is not None
    report["report"] = replace(
        REPORT, pictures=replace(REPORT.pictures, pictures=(equal, *FEW[1:]))
    )
    plain = json.loads(run("--json").stdout, parse_constant=refuse)
    assert plain["components"][1]["deviation"]["psnr"] is None
    assert plain["pictures"]["psnr"] == {"min": 21.0, "median": 22.0, "max": None}
    assert plain["pictures"]["objects"] == {"bundle": 2 / 3, "pytorch": 1.0}
    assert [picture["seed"] for picture in plain["pictures"]["pictures"]] == [0, 1, 2]
    assert plain["layers"]["worst"] == "transformer_blocks.0.ff.net.2"
    assert len(plain["layers"]["sqnr"]) == 6


def test_a_report_of_a_machine_without_pytorch(report: dict[str, Any]) -> None:
    report["report"] = ALONE
    assert "No pictures were compared" in run().stdout
    plain = json.loads(run("--json").stdout)
    assert plain["pictures"] is None
    assert plain["layers"] is None


@pytest.mark.parametrize("case", ["all", "one picture", "equal pictures", "no layers", "no gate"])
def test_the_plot_is_drawn(report: dict[str, Any], tmp_path: Path, case: str) -> None:
    pytest.importorskip("matplotlib")
    pictures, layers = REPORT.pictures, REPORT.layers
    assert pictures is not None
    assert layers is not None
    if case == "one picture":
        pictures = replace(pictures, pictures=FEW[:1])
    if case == "equal pictures":
        pictures = replace(pictures, pictures=(replace(FEW[0], psnr=math.inf, ssim=1.0),))
    if case == "no gate":
        layers = replace(layers, min_sqnr=None)
    report["report"] = replace(
        REPORT, pictures=pictures, layers=None if case == "no layers" else layers
    )
    path = tmp_path / "quality.png"
    assert run("--plot", path).exit_code == 0
    assert report["pictures"] == 1
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.height > 0.6 * image.width or case == "no layers"


def test_a_plot_that_cannot_be_is_refused_before_the_work(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("--plot", tmp_path / "missing" / "quality.png")
    assert result.exit_code == 2
    assert "a folder that exists" in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--plot", tmp_path / "quality.png")
    assert result.exit_code == 1
    assert f"needs the package matplotlib: {install_command('dev')}" in result.stderr
    assert "pictures" not in report
