"""What `auto` takes on a CPU, over processors, installed runtimes and precisions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from engines import choose_builder, choose_for_cpu, choose_runtime, choose_target
from engines.onnxruntime import OnnxRuntime
from engines.openvino import OpenVino
from engines.processor import choose_on_cpu
from fluxdeploy.cli import main
from fluxdeploy.install import install_command

SAPPHIRE_RAPIDS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile")
SAPPHIRE_RAPIDS += ("amx_int8", "amx_bf16")
ZEN_4 = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16")
CASCADE_LAKE = ("avx2", "avx512f", "avx512_vnni")
ALDER_LAKE = ("avx2", "avx_vnni")
GRAVITON_3 = ("asimddp", "i8mm", "bf16", "sve")
BOTH = ("onnxruntime", "openvino")

NARROW = ("bf16", "int8", "int8-weights", "int4-weights")


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize(("sets", "unit"), [(SAPPHIRE_RAPIDS, "AMX"), (ZEN_4, "AVX-512")])
def test_bfloat16_products_are_openvinos(sets: tuple[str, ...], unit: str, precision: str) -> None:
    choice = choose_on_cpu(sets, BOTH, BOTH, precision)
    assert choice.runtime == "openvino"
    words = f"OpenVINO is taken, since this processor multiplies bfloat16 ({unit}), "
    assert choice.reason.startswith(words)
    assert ("--precision int8 is faster still" in choice.reason) == (precision == "bf16")
    assert choice.reason.endswith("for machines without either, name --runtime onnxruntime")


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize(("sets", "unit"), [(SAPPHIRE_RAPIDS, "AMX"), (ZEN_4, "AVX-512")])
def test_openvino_that_would_be_faster_and_is_not_installed_is_told(
    sets: tuple[str, ...], unit: str, precision: str
) -> None:
    choice = choose_on_cpu(sets, BOTH, ("onnxruntime",), precision)
    assert choice.runtime == "onnxruntime"
    assert f"multiplies bfloat16 ({unit}): OpenVINO" in choice.reason
    assert choice.reason.endswith(f"is not installed: {install_command('openvino')}")


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("sets", [CASCADE_LAKE, ALDER_LAKE, GRAVITON_3, ()])
@pytest.mark.parametrize("installed", [BOTH, ("onnxruntime",)])
def test_other_processors_stay_with_the_first(
    sets: tuple[str, ...], installed: tuple[str, ...], precision: str
) -> None:
    choice = choose_on_cpu(sets, BOTH, installed, precision)
    assert (choice.runtime, choice.reason) == ("onnxruntime", "")


def test_what_gains_nothing_stays_with_the_first() -> None:
    choice = choose_on_cpu(SAPPHIRE_RAPIDS, BOTH, BOTH, "fp32")
    assert (choice.runtime, choice.reason) == ("onnxruntime", "")


def test_where_one_alone_is_installed_or_has_the_precision_it_is_taken() -> None:
    for sets in ((), SAPPHIRE_RAPIDS):
        choice = choose_on_cpu(sets, BOTH, ("openvino",), "bf16")
        assert (choice.runtime, choice.reason) == ("openvino", "")
    alone = choose_on_cpu(SAPPHIRE_RAPIDS, ("onnxruntime",), ("onnxruntime",), "bf16")
    assert (alone.runtime, alone.reason) == ("onnxruntime", "")
    assert choose_on_cpu(SAPPHIRE_RAPIDS, BOTH, (), "bf16").runtime == "onnxruntime"


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AMX, no GPU, and OpenVINO installed."""
    for name in ("registry", "openvino"):
        monkeypatch.setattr(
            f"engines.{name}.describe_cpu", lambda: {"instruction_sets": [*SAPPHIRE_RAPIDS]}
        )
    for kind in (OnnxRuntime, OpenVino):
        monkeypatch.setattr(kind, "availability", _on_cpus)


def _on_cpus(self: object, target: str, device: int = 0) -> object:
    from engines import Availability

    return Availability(target == "cpu", "")


@pytest.mark.usefixtures("amx")
def test_auto_goes_by_the_processor_and_names_override() -> None:
    for targets in ((), ("cpu",)):
        for choose in (choose_runtime, choose_builder):
            assert choose("auto", targets, "bf16")[0].name == "openvino"
            assert choose("auto", targets, "fp32")[0].name == "onnxruntime"
            assert choose("auto", targets, "fp16")[0].name == "onnxruntime"
            assert choose("auto", targets, "int8-dynamic")[0].name == "onnxruntime"
            for name in BOTH:
                assert choose(name, targets, "bf16")[0].name == name
    assert choose_target(precision="int8")[0].name == "openvino"


@pytest.mark.usefixtures("amx")
def test_a_component_that_openvino_has_not_keeps_the_bundle_from_it() -> None:
    assert (
        choose_builder(precision="bf16", component_precision={"t5": "fp32"})[0].name == "openvino"
    )
    beside = {"t5": "fp8-weights"}
    assert choose_builder(precision="bf16", component_precision=beside)[0].name == "onnxruntime"
    choice = choose_for_cpu("bf16", beside)
    assert choice is not None
    assert (choice.runtime, choice.reason) == ("onnxruntime", "")
    assert choose_for_cpu("fp4") is None


@pytest.mark.usefixtures("amx")
def test_plan_and_doctor_tell_the_choice(tmp_path: Path) -> None:
    pytest.importorskip("torch")

    def report(*arguments: str) -> dict[str, object]:
        result = CliRunner().invoke(main, [*arguments, "--json"], prog_name="fluxdeploy")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert isinstance(found, dict)
        return found

    sentence = choose_on_cpu(SAPPHIRE_RAPIDS, BOTH, BOTH, "bf16").reason
    out = ("--out", str(tmp_path / "bundle"))
    chosen = report("plan", *out)
    assert chosen["runtime"] == "openvino"
    assert sentence in chosen["warnings"]
    for options in (("--runtime", "onnxruntime"), ("--precision", "fp32")):
        named = report("plan", *out, *options)
        assert named["runtime"] == "onnxruntime"
        assert not any("OpenVINO" in line for line in named["warnings"])
    named = report("plan", *out, "--runtime", "openvino")
    assert named["runtime"] == "openvino"
    assert not any("OpenVINO" in line for line in named["warnings"])
    auto = {"name": "openvino", "target": "cpu", "reason": sentence}
    assert report("doctor")["auto"] == auto
    text = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "400"}).stdout
    assert sentence in text
