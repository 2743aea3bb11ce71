"""A runtime is its module and a line of the registry: whoever asks for runtimes knows it then."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from engines import (
    BuildSettings,
    EngineOptions,
    EngineSource,
    Runtime,
    choose_builder,
    choose_target,
    open_engine,
    registry,
    runtimes,
)
from fluxdeploy.build.engines import build_engines
from fluxdeploy.build.resolve import list_engines
from fluxdeploy.cli import main
from fluxdeploy.errors import EngineError, UsageError
from fluxdeploy.install import install_command
from fluxdeploy.precision import PRECISIONS, Precision, Quantization
from fluxdeploy.progress import Progress
from tests.engines.conftest import INPUTS, RANGES, Make, arrays, engine_record, expected

QUIET = Progress(quiet=True)
ADDED = {
    "opening": ("tests.engines.opening_runtime", "OpeningRuntime"),
    "building": ("tests.engines.building_runtime", "BuildingRuntime"),
}
FORMATS = {
    "fp8-attention": Quantization("fp8", "static", attention=True),
    "fp8-running": Quantization("fp8", "dynamic"),
    "int8-attention": Quantization("int8", "static", attention=True),
    "int8-again": Quantization("int8", "dynamic"),
    "int8-plain": Quantization("int8"),
    "fp4-weights": Quantization("nvfp4"),
}
"""Precisions that there are not, in formats that there are, and rows that are like them."""


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RUNTIMES", {**ADDED, **registry._RUNTIMES})


def run(*args: str) -> Result:
    result = CliRunner().invoke(main, args, prog_name="fluxdeploy", env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result


def named(name: str) -> Runtime:
    return runtimes(name)[0]


def test_it_is_chosen_in_its_place() -> None:
    runtime, target = choose_target()
    assert (runtime.name, target) == ("opening", "npu-large"), "the first that can run"
    runtime, targets = choose_builder(targets=["tpu"])
    assert (runtime.name, targets) == ("building", ("tpu",))
    with pytest.raises(UsageError, match="opening has npu-large, npu-small; building has tpu; ten"):
        choose_builder(targets=["abacus"])
    with pytest.raises(EngineError, match=r"tpu: there is no .*building builds for tpu"):
        choose_target("building")


def test_a_bundle_has_its_engines_and_they_open(bundle: Make) -> None:
    made = bundle(engine_record("opening", "npu-small"), engine_record("opening", "npu-large"))
    inputs = arrays()
    with open_engine(made, "tiny", options=EngineOptions(device=1)) as engine:
        assert (engine.target, engine.options.device) == ("npu-large", 1)  # type: ignore[attr-defined]
        assert (engine.run(inputs)["y"] == expected(**inputs)).all()
    with pytest.raises(EngineError, match="opening on npu-large: there are 2 of npu-large; open"):
        open_engine(made, "tiny", options=EngineOptions(device=2))


def test_a_build_lists_and_makes_its_engines(tmp_path: Path) -> None:
    (opened,) = list_engines(named("opening"), ("npu-small",), "tiny", RANGES)
    assert opened.path == "onnx/tiny.onnx"
    runtime = named("building")
    engines = list_engines(runtime, ("tpu",), "tiny", RANGES)
    source = EngineSource(
        "tiny", PRECISIONS["fp8"], "fp32", tmp_path / "tiny.onnx", INPUTS, 3, 1, False, 40
    )
    arguments = (engines, BuildSettings((RANGES,)), tmp_path, QUIET)
    assert build_engines(runtime, source, *arguments) == ["engines/building/tpu/tiny.engine"]
    asked = json.loads((tmp_path / engines[0].path).read_text())
    assert asked == ["fp8", "fp32", 3, 1, 40, ["tpu"]]
    with pytest.raises(EngineError, match="The tiny engine has no fp8"):
        build_engines(runtime, replace(source, quantized=0), *arguments)


def test_doctor_tells_of_it() -> None:
    report = json.loads(run("doctor", "--json").stdout)
    found = {(each["name"], each["target"]): each for each in report["runtimes"]}
    assert found["opening", "npu-small"]["ok"]
    assert found["opening", "npu-small"]["version"]
    assert found["building", "tpu"]["detail"] == "there is no accelerator"
    assert report["auto"] == {"name": "opening", "target": "npu-large", "reason": ""}
    assert report["packages"]["npu"].keys() == {"opening-runtime", "numpy"}
    assert report["packages"]["tpu"] == {"building-runtime": None}
    text = run("doctor").stdout
    assert "npu: Opening on neural processors  numpy" in text
    assert f"missing building-runtime: {install_command('tpu')}" in text


def test_a_plan_is_made_for_it(tmp_path: Path) -> None:
    pytest.importorskip("torch")

    def plan(*options: str) -> dict[str, Any]:
        report = json.loads(run("plan", "--out", str(tmp_path / "b"), "--json", *options).stdout)
        assert isinstance(report, dict)
        return report

    opened = plan("--target", "npu-small", "--precision", "int8")
    assert opened["runtime"] == "opening"
    assert {part["precision"] for part in opened["components"]} == {"int8", "int8-weights", "fp32"}
    assert all(part["engine"] == 0 for part in opened["components"])
    assert any("emulated" in warning for warning in opened["warnings"])
    built = plan("--runtime", "building", "--target", "tpu")
    parts = {part["name"]: part for part in built["components"]}
    assert all(part["engine"] == part["resident"] + 1000 for part in parts.values())
    assert built["run"]["all_open"] < sum(
        part["resident"] + part["activations"] for part in parts.values()
    ), "engines compute in one block, by turns"
    phases = {phase["name"]: phase["bytes"] for phase in built["build"]}
    assert phases["engine"] == 800_000_007


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> None:
    table: Any = PRECISIONS
    for name, quantization in FORMATS.items():
        row = Precision(name, 1.0, 0.0, 0.0, 0.0, 0.0, quantization)
        monkeypatch.setitem(table, name, row)


ROWS = {
    "fp8-attention": "fp8",
    "int8-attention": "int8",
    "int8-again": "int8-dynamic",
    "int8-plain": "int8-weights",
    "fp4-weights": "fp4",
}


@pytest.mark.usefixtures("formats")
@pytest.mark.parametrize(("new", "like"), ROWS.items())
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx", "onnxruntime", "openvino", "native"])
def test_a_new_row_over_a_known_format_is_a_runtime_s_like_the_others(
    name: str, new: str, like: str
) -> None:
    runtime = named(name)
    for target in runtime.targets:
        possible = [runtime.precision_problem(target, row) is None for row in (new, like)]
        assert possible[0] == possible[1], target
        assert runtime.compute(target, new) == runtime.compute(target, like)
        assert runtime.emulates(target, new) == runtime.emulates(target, like)
        assert runtime.widens_weights(target, new) == runtime.widens_weights(target, like)


@pytest.mark.usefixtures("formats")
def test_static_integers_become_dynamic_on_cpus_whatever_their_row() -> None:
    runtime = named("onnxruntime")
    assert runtime.precision("cpu", "int8-attention") == "int8-dynamic"
    assert runtime.precision("cuda", "int8-attention") == "int8-attention"
    assert runtime.precision("cpu", "fp8-attention") == "fp8-attention"
    assert runtime.precision("cpu", "int8-plain") == "int8-plain"


@pytest.mark.usefixtures("formats")
def test_scales_made_as_it_runs_are_not_tensorrts() -> None:
    assert "is for ONNX Runtime" in str(named("tensorrt").precision_problem("sm90", "fp8-running"))
