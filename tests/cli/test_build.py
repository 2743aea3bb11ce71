"""`fluxdeploy build`: what it says at its end, and what it does not replace without being told."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from engines import Availability, choose_runtime, runs_here
from engines.onnxruntime import OnnxRuntime
from fluxdeploy.build import build as builder
from fluxdeploy.build.plan.objections import find_impossible
from fluxdeploy.build.resolve import BuildRequest, list_engines
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.manifest import EngineRecord, Manifest
from fluxdeploy.cli import main
from tests.support.small_bundle import small_files, small_manifest, write_small_bundle

ELSEWHERE = ("--runtime", "onnxruntime", "--target", "cuda")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        OnnxRuntime,
        "availability",
        lambda self, target, device=0: Availability(target == "cpu", "there is no GPU"),
    )


def manifest_for(*engines: tuple[str, str]) -> Manifest:
    """Of a small bundle with engines for these runtimes and targets."""
    manifest = small_manifest(small_files())
    t5 = manifest.components["t5"]
    (engine,) = t5.engines
    records = tuple(replace(engine, runtime=name, target=target) for name, target in engines)
    return replace(manifest, components={"t5": replace(t5, engines=records)})


Write = Callable[..., Path]


@pytest.fixture
def earlier(tmp_path: Path) -> Write:
    """A bundle that lies where another is to be built."""

    def write(*engines: tuple[str, str]) -> Path:
        return write_small_bundle(tmp_path / "bundle", small_files(), manifest_for(*engines))

    return write


def test_a_bundle_that_runs_here_is_not_replaced_by_one_that_does_not(earlier: Write) -> None:
    pytest.importorskip("torch")
    bundle = earlier(("onnxruntime", "cpu"))
    before = sorted(bundle.parent.rglob("*"))
    words = (
        f"{bundle} holds a bundle that runs on this machine, and one for onnxruntime on cuda would "
        "not: choose another --out, or add --replace"
    )
    built, planned = (run(name, *ELSEWHERE, "--out", bundle) for name in ("build", "plan"))
    assert (built.exit_code, planned.exit_code) == (2, 1)
    assert f"Error: {words}.\n" in built.stderr
    assert words in " ".join(planned.stdout.split())
    assert sorted(bundle.parent.rglob("*")) == before
    report = run("plan", *ELSEWHERE, "--out", bundle, "--json").stdout
    assert words in json.loads(report)["problems"]


def objections(destination: Path, target: str, replace: bool = False) -> list[str]:
    """To a bundle for ONNX Runtime at `destination`."""
    runtime, targets = choose_runtime("onnxruntime", (target,))
    component = SimpleNamespace(
        name="t5",
        precision="fp32",
        compute="fp32",
        runtime=runtime,
        targets=targets,
        engines=list_engines(runtime, targets, "t5", {}),
    )
    checkpoint = SimpleNamespace(transformer=SimpleNamespace(width=64, head_dim=32))
    request = BuildRequest(runtimes=(runtime.name,), targets=targets, replace=replace)
    spec: Any = SimpleNamespace(
        runtime=runtime,
        targets=targets,
        components=[component],
        request=request,
        checkpoint=checkpoint,
    )
    return list(find_impossible(spec, destination))


def test_it_is_replaced_where_that_is_told_and_by_one_that_runs_here(earlier: Write) -> None:
    bundle = earlier(("onnxruntime", "cpu"))
    assert len(objections(bundle, "cuda")) == 1
    assert objections(bundle, "cuda", replace=True) == objections(bundle, "cpu") == []


@pytest.mark.parametrize(
    "engines",
    [
        [("onnxruntime", "cuda")],
        [("onnxruntime", "cuda"), ("tensorrt-rtx", "sm89")],
        [("of a later version", "cpu")],
        [("onnxruntime", "of a later version")],
        [],
    ],
)
def test_a_bundle_that_does_not_run_here_is_replaced(
    earlier: Write, engines: list[tuple[str, str]]
) -> None:
    assert objections(earlier(*engines), "cuda") == []


def test_no_bundle_and_a_broken_one_are_replaced(tmp_path: Path) -> None:
    assert objections(tmp_path / "bundle", "cuda") == []
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/fluxdeploy.json").write_text("{")
    assert objections(tmp_path / "bundle", "cuda") == []


@pytest.mark.parametrize(
    ("engines", "here"),
    [
        ([["onnxruntime cpu"], ["onnxruntime cuda", "onnxruntime cpu"]], True),
        ([["onnxruntime cpu"], ["onnxruntime cuda"]], False),
        ([["onnxruntime cpu"], []], False),
        ([["onnxruntime tpu"]], False),
        ([["later cpu"]], False),
    ],
)
def test_a_bundle_runs_here_where_each_component_does(engines: list[list[str]], here: bool) -> None:
    components = [
        [EngineRecord(*words.split()[:1], "1", *words.split()[1:], "", {}) for words in component]
        for component in engines
    ]
    assert runs_here(components) == here


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`fluxdeploy build`, whose work is already done."""

    def call(manifest: Manifest, *options: str) -> Result:
        made = Bundle(Path("made"), manifest, "0" * 64)
        monkeypatch.setattr(builder, "build", lambda *_: made)
        result = run("build", "--out", "a b", *options)
        assert result.exit_code == 0, result.output
        return result

    return call


def test_the_call_that_is_told_has_what_the_task_takes(build: Callable[..., Result]) -> None:
    fill = dataclasses.replace(manifest_for(("onnxruntime", "cpu")), tasks=("fill",))
    assert build(fill).stdout.endswith("--bundle 'a b' --image picture.png --mask mask.png\n")


def test_only_what_runs_here_is_called_ready(build: Callable[..., Result]) -> None:
    said = build(manifest_for(("onnxruntime", "cpu"))).stdout
    assert said.endswith("a b is ready: fluxdeploy generate \"a prompt\" --bundle 'a b'\n")


def test_what_is_for_other_machines_is_told_with_a_way_to_look_at_it(
    build: Callable[..., Result],
) -> None:
    manifest = manifest_for(("tensorrt-rtx", "sm89"), ("tensorrt-rtx", "sm120"))
    ready, look = build(manifest).stdout.splitlines()[-2:]
    assert ready == "a b is ready for tensorrt-rtx on sm89, sm120; nothing on this machine runs it"
    assert look.startswith("to see here what it draws, slowly: fluxdeploy generate ")
    _, name, *arguments = shlex.split(look.partition(": ")[2])
    # A command keeps the help option that its first context gives it.
    group = click.Context(main, info_name="fluxdeploy", **main.context_settings)
    command = main.get_command(group, name)
    assert command is not None
    parsed = command.make_context(name, arguments, parent=group)
    assert (parsed.params["bundle"], parsed.params["runtime"]) == (Path("a b"), "emulate")


@pytest.mark.parametrize(("target", "here"), [("cpu", True), ("cuda", False)])
def test_json_tells_whether_it_runs_here(
    build: Callable[..., Result], target: str, here: bool
) -> None:
    report = json.loads(build(manifest_for(("onnxruntime", target)), "--json").stdout)
    assert report["runs_here"] is here
