"""Bundles for `native`: our kernels for the transformer, ONNX Runtime on CUDA for the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from engines import open_engine, runtimes
from engines.golden import measure_component, require
from exporters.checkpoint import Checkpoint
from exporters.synthetic.sparse_checkpoint import FLUX_DEV, write_sparse_checkpoint
from fluxdeploy.build.build import build
from fluxdeploy.build.checkpoint import CheckpointHashes, find_checkpoint
from fluxdeploy.build.keys import content_key
from fluxdeploy.build.last import LastBuild
from fluxdeploy.build.plan import make_plan
from fluxdeploy.build.resolve import BuildRequest, BuildSpec, resolve
from fluxdeploy.build.sizes import SizeRange
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.cli import main
from fluxdeploy.errors import EngineError, UsageError
from fluxdeploy.progress import Progress
from tests.support.shared_folder import SharedFolder

NATIVE, CUDA = ("native", "sm90"), ("onnxruntime", "cuda")


def resolved(checkpoint: Checkpoint, how: tuple[str, str], request: BuildRequest) -> BuildSpec:
    name, target = how
    return resolve(request, checkpoint, runtimes(name)[0], (target,))


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return find_checkpoint(None)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_all_but_the_transformer_is_that_of_a_bundle_for_cuda(
    demo: Checkpoint, precision: str
) -> None:
    """Down to the content key: a build takes over what the other has made."""
    request = BuildRequest(precision=precision, sizes=SizeRange(opt=(256, 256)))
    native, cuda = (resolved(demo, how, request) for how in (NATIVE, CUDA))
    hashes = CheckpointHashes({file.resolve(): str(file) for file in demo.files}, "digest")
    assert native.defaults == cuda.defaults == demo.defaults, "no size is better than others"
    for ours, theirs in zip(native.components, cuda.components, strict=True):
        keys = [
            content_key(component, spec, hashes, component.export.layers)
            for component, spec in ((ours, native), (theirs, cuda))
        ]
        assert (keys[0] == keys[1]) == (ours.name != "transformer"), ours.name
    transformer = native.component("transformer")
    (engine,) = transformer.engines
    assert (transformer.compute, transformer.fused) == ("bf16", False)
    assert engine.path == "engines/native/sm90/transformer.engine"
    assert (engine.runtime, engine.target) == NATIVE
    assert engine.dimensions == cuda.component("transformer").engines[0].dimensions


def test_a_plan_reckons_with_both_runtimes(shared_folder: SharedFolder, tmp_path: Path) -> None:
    folder = shared_folder.entry("sparse-dev", lambda path: write_sparse_checkpoint(path, FLUX_DEV))
    checkpoint = find_checkpoint(str(folder))
    native, cuda = (
        make_plan(resolved(checkpoint, how, BuildRequest(precision="fp8")), tmp_path / "bundle")
        for how in (NATIVE, CUDA)
    )
    assert native.impossible == ()
    ours, theirs = ({c.name: c for c in plan.components} for plan in (native, cuda))
    assert [name for name, part in ours.items() if part.engine] == ["transformer"]
    assert {phase.component for phase in native.build if phase.name == "engine"} == {"transformer"}
    for name in ours.keys() - {"transformer"}:
        assert ours[name] == theirs[name]
    denoising = ours["transformer"].resident + ours["transformer"].activations
    assert denoising < 14e9, "weights once, in 8 bits"
    told = " ".join(native.warnings)
    assert "native engines for sm90 will not be checked here" in told
    assert "onnxruntime engines for cuda will not be checked here" in told


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("fp8-weights", "transformer: native would widen the weights of fp8-weights; use fp8-li"),
        ("int8", "transformer: native has no kernels for int8; use fp8"),
        ("fp16", "transformer: native has no kernels for fp16; use bf16"),
    ],
)
def test_what_the_kernels_have_not_is_impossible(
    demo: Checkpoint, tmp_path: Path, precision: str, words: str
) -> None:
    spec = resolved(demo, NATIVE, BuildRequest(precision=precision, runtimes=("native",)))
    with pytest.raises(UsageError, match=words):
        make_plan(spec, tmp_path / "bundle").require_possible()


def test_another_onnx_runtime_is_another_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its version is in the records of the components that it runs."""
    (native,), (other,) = (runtimes(name) for name in ("native", "onnxruntime"))
    last = LastBuild(BuildRequest(), tmp_path / "bundle", [(native, ("sm90",))])
    found = last._versions(["clip", "transformer"])
    assert found == [["onnxruntime", other.version(), "cuda"], ["native", native.version(), "sm90"]]


@pytest.mark.usefixtures("remembered_traces")
def test_a_bundle_is_built_without_a_gpu(tmp_path: Path) -> None:
    request = BuildRequest(
        precision="fp8", runtimes=("native",), targets=("sm90",), promise=Promise()
    )
    with Progress(quiet=True) as progress:
        bundle = build(request, tmp_path / "bundle", progress)
    opened = open_bundle(bundle.root, check="all")
    for name, component in opened.manifest.components.items():
        (engine,) = component.engines
        assert (engine.runtime, engine.target) == (NATIVE if name == "transformer" else CUDA)
    steps = json.loads((bundle.root / "engines/native/sm90/transformer.kernels.json").read_text())
    assert steps["widened"] is None
    kinds = {step["type"] for step in steps["steps"] if step["what"] == "attention"}
    assert kinds == {"fp8"}
    shown = CliRunner().invoke(main, ["inspect", str(bundle.root)], env={"COLUMNS": "120"}).stdout
    assert f"native {runtimes('native')[0].version()} sm90" in shown
    transformer = opened.manifest.components["transformer"]
    with open_engine(opened, "transformer", "emulate") as engine:
        assert transformer.golden is not None
        golden = opened.path(transformer.golden.path)
        require("transformer", measure_component(engine, golden), transformer.golden)
    with pytest.raises(EngineError, match=r"native on sm90: .*--runtime emulate"):
        open_engine(opened, "transformer", "native")
