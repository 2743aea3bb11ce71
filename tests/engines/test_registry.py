"""Which engine is opened, and what is said where none can be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines import (
    AUTO,
    Availability,
    choose_runtime,
    choose_target,
    open_engine,
    registry,
    runtime_names,
    runtimes,
)
from engines.onnxruntime import OnnxRuntime
from fluxdeploy.bundle.manifest import EngineRecord
from fluxdeploy.errors import EngineError, UsageError
from tests.engines.conftest import Make, arrays, engine_record, expected

ROOT = Path(__file__).parents[2]


def test_importing_engines_imports_no_runtime() -> None:
    heavy = "{'onnxruntime', 'tensorrt_rtx', 'cuda', 'torch', 'onnx'}"
    code = f"import sys, engines; print(*{heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", [AUTO, "onnxruntime"])
def test_opens_what_the_bundle_has(bundle: Make, name: str) -> None:
    inputs = arrays()
    with open_engine(bundle(), "tiny", name) as engine:
        assert engine.component == "tiny"
        assert (engine.run(inputs)["y"] == expected(**inputs)).all()
    assert "onnxruntime" in runtime_names()


def test_target_for_this_machine_is_the_cpu_where_there_is_no_gpu() -> None:
    runtime, target = choose_target("onnxruntime")
    assert runtime.name == "onnxruntime"
    assert runtime.availability(target).ok
    if not runtime.availability("cuda").ok:
        assert target == "cpu"


def test_unknown_runtime(bundle: Make) -> None:
    with pytest.raises(
        UsageError,
        match="no runtime 'tensorrrt'; the runtimes are auto, tensorrt, tensorrt-rtx, nat",
    ):
        open_engine(bundle(), "tiny", "tensorrrt")
    with pytest.raises(UsageError, match="no runtime ''"):
        runtimes("")


def test_unknown_component(bundle: Make) -> None:
    with pytest.raises(EngineError, match="has no unet; it holds tiny"):
        open_engine(bundle(), "unet")


def test_runtime_that_the_bundle_was_not_built_for(bundle: Make) -> None:
    made = bundle(engine_record("tensorrt", "sm89"))
    with pytest.raises(EngineError, match="--runtime onnxruntime: it has engines for tensorrt on"):
        open_engine(made, "tiny", "onnxruntime")


def test_component_without_engines(bundle: Make) -> None:
    made = bundle()
    record = made.manifest.components["tiny"]
    made.manifest.components["tiny"] = type(record)(**{**vars(record), "engines": ()})
    with pytest.raises(EngineError, match="it has engines for nothing"):
        open_engine(made, "tiny")


def test_cuda_engine_without_a_gpu(bundle: Make) -> None:
    (runtime,) = runtimes("onnxruntime")
    if runtime.availability("cuda").ok:
        pytest.skip("this machine has a GPU")
    made = bundle(engine_record(target="cuda"))
    with pytest.raises(EngineError, match=r"onnxruntime on cuda: .*(\[gpu\]|driver)"):
        open_engine(made, "tiny")
    made = bundle(engine_record(target="cuda"), engine_record(target="cpu"))
    inputs = arrays()
    assert (open_engine(made, "tiny").run(inputs)["y"] == expected(**inputs)).all()


def test_the_best_target_is_opened_whatever_the_bundle_s_order(
    bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU before the CPU, and the registry's runtimes from first to last."""
    opened: list[tuple[str, str]] = []

    class Pretended(OnnxRuntime):
        def availability(self, target: str, device: int = 0) -> Availability:
            return Availability(True, "")

        def open(self, component: str, record: Any, engine: EngineRecord, *others: Any) -> Any:
            opened.append((engine.runtime, engine.target))
            return SimpleNamespace()

    class PretendedToo(Pretended):
        name = "openvino"
        targets = ("cpu",)

    made = {"onnxruntime": Pretended(), "openvino": PretendedToo()}
    monkeypatch.setattr(registry, "_runtime", made.__getitem__)
    monkeypatch.setattr(registry, "_RUNTIMES", dict.fromkeys(made))
    engines = [
        engine_record("openvino", "cpu"),
        engine_record("onnxruntime", "cpu"),
        engine_record("onnxruntime", "cuda"),
    ]
    for engine in (engines, engines[::-1], engines[:2], engines[:1]):
        open_engine(bundle(*engine), "tiny")
    best = ("onnxruntime", "cuda")
    assert opened == [best, best, ("onnxruntime", "cpu"), ("openvino", "cpu")]
    assert choose_target()[1] == "cuda"
    assert choose_target("openvino")[0].name == "openvino"


@pytest.mark.parametrize("targets", [("sm89", "sm120"), ("sm120", "sm89"), ("sm89",) * 2])
def test_targets_keep_the_order_in_which_they_were_asked_for(targets: tuple[str, ...]) -> None:
    """The first one's types are those of all."""
    assert choose_runtime("tensorrt-rtx", targets)[1] == tuple(dict.fromkeys(targets))


def test_targets_and_runtimes_stand_from_best_to_worst() -> None:
    chosen = ("tensorrt", "tensorrt-rtx", "native", "onnxruntime", "openvino")
    assert runtime_names() == (*chosen, "emulate")
    assert tuple(runtime.name for runtime in runtimes()) == chosen
    for name in ("tensorrt", "tensorrt-rtx"):
        (runtime,) = runtimes(name)
        numbers = [int(target.removeprefix("sm")) for target in runtime.targets]
        assert numbers == sorted(numbers, reverse=True)
    assert runtimes("onnxruntime")[0].targets == ("cuda", "cpu")


def test_a_runtime_that_builds_nothing_is_no_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Availability(False, "not here")
    monkeypatch.setattr(OnnxRuntime, "availability", lambda self, target, device=0: nowhere)
    with pytest.raises(EngineError, match=r"onnxruntime on cuda, cpu: not here\.$"):
        choose_target("onnxruntime")
