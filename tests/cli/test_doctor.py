"""`fluxdeploy doctor`: the report, and the odd machines it must survive."""

from __future__ import annotations

import json
import os
import stat
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fluxdeploy.cli import doctor, main
from fluxdeploy.install import install_command


def run(*args: str) -> Result:
    return CliRunner().invoke(
        main, ["doctor", *args], prog_name="fluxdeploy", env={"COLUMNS": "200"}
    )


def use_nvidia_smi(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_report_covers_machine_packages_and_runtimes() -> None:
    result = run("--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["cpu"]["cores"] >= 1
    assert report["disk"]["free"] > 0
    assert report["packages"]["base"]["numpy"]
    assert "CPUExecutionProvider" in report["onnxruntime_providers"]
    runtimes = {(runtime["name"], runtime["target"]): runtime for runtime in report["runtimes"]}
    assert runtimes["onnxruntime", "cpu"]["ok"]
    assert runtimes["emulate", "cpu"]["ok"]
    assert "where --runtime names it" in runtimes["emulate", "cpu"]["detail"]
    assert all(runtime["detail"] for runtime in report["runtimes"])
    assert runtimes[report["auto"]["name"], report["auto"]["target"]]["ok"]


def test_a_machine_that_can_run_nothing_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.registry._RUNTIMES", {})
    result = run("--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["auto"] is None
    assert "nothing: no runtime can run here" in run().stdout


def test_people_get_the_same_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed_version", lambda name: None)
    result = run()
    assert result.exit_code == 0, result.stderr
    assert "CPUExecutionProvider" in result.stdout
    assert "missing cuda-python, nvidia-ml-py, tensorrt-rtx" in " ".join(result.stdout.split())
    assert install_command("rtx") in result.stdout
    assert "--runtime auto takes" in result.stdout


def test_gpus_are_listed_as_nvidia_smi_gives_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = "NVIDIA GeForce RTX 4090, 24564, 580.65.06, 8.9"
    use_nvidia_smi(monkeypatch, tmp_path, f"echo '{line}'; echo 'NVIDIA GB10, [N/A], 580.95, 12.1'")
    report = json.loads(run("--json").stdout)
    assert report["gpus"] == [
        {
            "name": "NVIDIA GeForce RTX 4090",
            "memory": 24564 * 2**20,
            "driver": "580.65.06",
            "compute_capability": "8.9",
        },
        {
            "name": "NVIDIA GB10",
            "memory": None,
            "driver": "580.95",
            "compute_capability": "12.1",
        },
    ]
    assert "GeForce RTX 4090, 24.0 GiB" in run().stdout


def test_nvidia_smi_without_a_driver_means_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_nvidia_smi(monkeypatch, tmp_path, "echo 'NVIDIA-SMI has failed'; exit 9")
    result = run("--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["gpus"] == []


def test_the_gpu_package_stands_for_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(doctor, "_installed_version", installed.get)
    packages = json.loads(run("--json").stdout)["packages"]
    assert packages["base"]["onnxruntime"] == "1.31.1"
    assert packages["base"]["numpy"] is None


def test_a_folder_that_was_never_installed_knows_no_packages_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def requires(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", requires)
    report = json.loads(run("--json").stdout)
    assert report["packages"]["base"] == {}
    assert "tensorrt-rtx" in report["packages"]["rtx"]
    assert any("pip install --editable" in note for note in report["notes"])


def test_without_numpy_the_base_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "engines", None)
    report = json.loads(run("--json").stdout)
    assert set(report["packages"]) == {"base", "control", "export", "ray", "serve"}
    assert "numpy" in report["packages"]["base"]
    assert "base: generate, inspect, doctor" in run().stdout


def test_two_onnxruntime_packages_are_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed_version", lambda name: "1.31.1")
    result = run()
    assert "pip uninstall --yes onnxruntime onnxruntime-gpu" in result.stdout
