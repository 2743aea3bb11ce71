"""Which runtimes a bundle is built for, and which of its editions a machine runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engines import choose_edition, choose_runtimes, open_engine, registry
from engines.base import Availability
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import EngineError, UsageError
from tests.support.editions import for_runtime
from tests.support.small_bundle import small_files, small_manifest

ALL = ("tensorrt-rtx", "native", "onnxruntime", "openvino")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The runtimes that this machine is said to run, to be changed; and it builds for all."""
    able = {"onnxruntime", "openvino"}
    for module in ("registry", "editions"):
        monkeypatch.setattr(f"engines.{module}.describe_cpu", lambda: {"instruction_sets": ()})

    for name in registry._RUNTIMES:
        runtime = registry._runtime(name)

        def available(target: str, device: int = 0, name: str = name) -> Availability:
            return Availability(name in able, f"{name} is not for this machine")

        monkeypatch.setattr(runtime, "availability", available)
        monkeypatch.setattr(runtime, "can_build", lambda target: Availability(True, ""))
    return able


@pytest.fixture
def manifest() -> Manifest:
    return small_manifest(small_files())


def bundle_for(manifest: Manifest, *runtimes: str) -> Bundle:
    made = [
        for_runtime(manifest, name, registry.runtimes(name)[0].targets[-1]) for name in runtimes
    ]
    return Bundle(Path("/b"), made[0].with_each(made), "0" * 64)


def chosen(bundle: Bundle, runtime: str = "auto") -> str:
    edition = choose_edition(bundle, runtime)
    assert not edition.manifest.editions
    return edition.manifest.runtime


@pytest.mark.parametrize("order", [ALL, tuple(reversed(ALL))])
def test_the_best_runtime_that_runs_here_is_taken(
    here: set[str],
    manifest: Manifest,
    order: tuple[str, ...],
) -> None:
    bundle = bundle_for(manifest, *order)
    assert chosen(bundle) == "onnxruntime"
    here.add("tensorrt-rtx")
    assert chosen(bundle) == "tensorrt-rtx"
    here -= {"tensorrt-rtx", "onnxruntime"}
    assert chosen(bundle) == "openvino"


@pytest.mark.parametrize(
    ("ours", "theirs", "sets", "taken"),
    [
        ("fp32", "bf16", ("amx_bf16",), "openvino"),
        ("int8", "int8", ("amx_bf16",), "openvino"),
        ("int8", "bf16", ("amx_bf16",), "onnxruntime"),
        ("fp32", "fp32", ("amx_bf16",), "onnxruntime"),
        ("fp32", "bf16", ("avx512_vnni",), "onnxruntime"),
    ],
)
def test_on_a_cpu_the_processor_decides_between_editions_of_one_precision(
    here: set[str],
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    ours: str,
    theirs: str,
    sets: tuple[str, ...],
    taken: str,
) -> None:
    monkeypatch.setattr("engines.editions.describe_cpu", lambda: {"instruction_sets": sets})
    made = []
    for name, precision in (("onnxruntime", ours), ("openvino", theirs)):
        each = for_runtime(manifest, name, "cpu")
        record = replace(each.components["transformer"], precision=precision)
        made.append(replace(each, components={**each.components, "transformer": record}))
    bundle = Bundle(Path("/b"), made[0].with_each(made), "0" * 64)
    assert chosen(bundle) == taken
    assert chosen(bundle, "onnxruntime") == "onnxruntime"


def test_a_runtime_that_is_named_is_taken_whether_it_runs_here_or_not(
    here: set[str],
    manifest: Manifest,
) -> None:
    bundle = bundle_for(manifest, *ALL)
    assert [chosen(bundle, name) for name in ALL] == list(ALL)
    with pytest.raises(EngineError, match="tensorrt-rtx is not for this machine"):
        open_engine(choose_edition(bundle, "tensorrt-rtx"), "t5")
    with pytest.raises(EngineError) as refused:
        choose_edition(bundle, "tensorrt")
    assert str(refused.value) == (
        "The bundle /b has no edition for --runtime tensorrt; it has editions for tensorrt-rtx, "
        "native, onnxruntime, openvino."
    )
    with pytest.raises(UsageError, match="no runtime 'x'"):
        choose_edition(bundle, "x")


def test_emulation_is_of_what_does_not_run_here(
    here: set[str],
    manifest: Manifest,
) -> None:
    assert chosen(bundle_for(manifest, "onnxruntime", "tensorrt-rtx"), "emulate") == "tensorrt-rtx"
    assert chosen(bundle_for(manifest, "onnxruntime", "openvino"), "emulate") == "onnxruntime"


def test_where_nothing_runs_every_reason_is_told(
    here: set[str],
    manifest: Manifest,
) -> None:
    here.clear()
    with pytest.raises(EngineError) as refused:
        choose_edition(bundle_for(manifest, "onnxruntime", "tensorrt-rtx"))
    assert str(refused.value) == (
        "No edition of the bundle /b runs here. onnxruntime on cpu: onnxruntime is not for this "
        "machine; tensorrt-rtx on sm75: tensorrt-rtx is not for this machine. To look at its "
        "pictures on this machine all the same: --runtime emulate."
    )


def test_a_bundle_with_one_edition_is_that_one(manifest: Manifest) -> None:
    bundle = Bundle(Path("/b"), manifest, "0" * 64)
    assert choose_edition(bundle) is choose_edition(bundle, "tensorrt-rtx") is bundle


def names(*arguments: object) -> list[tuple[str, ...]]:
    return [(r.name, *targets) for r, targets in choose_runtimes(*arguments)]  # type: ignore[arg-type]


def test_each_runtime_has_the_targets_that_it_knows(here: set[str]) -> None:
    mixed = ("cpu", "sm89", "sm120", "cpu")
    assert names(("openvino", "tensorrt-rtx", "onnxruntime"), mixed) == [
        ("openvino", "cpu"),
        ("tensorrt-rtx", "sm89", "sm120"),
        ("onnxruntime", "cpu"),
    ]
    assert names(("onnxruntime", "openvino")) == [("onnxruntime", "cuda"), ("openvino", "cpu")]


def test_auto_takes_one_runtime_that_has_all_targets_or_the_best_for_each(here: set[str]) -> None:
    assert names(("auto",), ("cpu",)) == [("onnxruntime", "cpu")]
    assert names(("auto",), ("sm120", "cpu", "sm89"), "bf16") == [
        ("tensorrt", "sm120", "sm89"),
        ("onnxruntime", "cpu"),
    ]
    assert names(("auto",), ("cuda", "cpu")) == [("onnxruntime", "cuda", "cpu")]


@pytest.mark.parametrize(
    ("runtimes", "targets", "words"),
    [
        (("auto", "openvino"), (), "--runtime auto chooses by itself"),
        (("openvino", "onnxruntime"), ("cpu", "sm89"), "the target sm89: openvino has cpu; onnx"),
        (("openvino", "tensorrt-rtx"), ("cpu",), "--runtime tensorrt-rtx has none of the targets"),
        (("openvino", "x"), (), "no runtime 'x'"),
        (("auto",), ("cpu", "tpu"), "targets tpu"),
    ],
)
def test_what_does_not_go_together_is_refused(
    here: set[str], runtimes: tuple[str, ...], targets: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        choose_runtimes(runtimes, targets)
