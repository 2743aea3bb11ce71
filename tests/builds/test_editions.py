"""Bundles for several runtimes: what is shared, what stays, and which edition is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch")
pytest.importorskip("openvino", reason="OpenVINO is not installed")

from engines import EngineOptions
from fluxdeploy.build import build as builder
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.cli import main
from fluxdeploy.errors import BundleError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.progress import Progress
from fluxdeploy.verify.verify import verify
from tests.builds.conftest import rewrite, tree
from tests.conftest import build_bundle

if TYPE_CHECKING:
    from tests.support.shared_folder import SharedFolder
    from tests.support.traces import Traces

Checkpoints = Callable[..., Path]
Built = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("remembered_traces")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def request_for(source: Path, *runtimes: str) -> BuildRequest:
    return BuildRequest(str(source), precision="fp32", runtimes=runtimes, targets=("cpu",))


@pytest.fixture(scope="session")
def source(checkpoints: Checkpoints) -> Path:
    return checkpoints("F32", name="dev")


@pytest.fixture(scope="session")
def built(shared_folder: SharedFolder, source: Path, remembered_traces: Path) -> Built:
    """`built(runtime, ...)`: the float32 bundle for these. Not to be written to."""

    def make(*runtimes: str) -> Path:
        request = request_for(source, *runtimes)
        return shared_folder.entry(
            f"editions-{'-'.join(runtimes)}", lambda folder: build_bundle(request, folder)
        )

    return make


@pytest.fixture
def both(tmp_path: Path, built: Built) -> Path:
    """A copy of the bundle for both runtimes."""
    shutil.copytree(built("onnxruntime", "openvino"), tmp_path / "both")
    return tmp_path / "both"


def names(bundle: Path) -> list[str]:
    return [each.runtime for each in open_bundle(bundle).manifest.each()]


def edition(bundle: Path, runtime: str) -> Manifest:
    return next(e for e in open_bundle(bundle).manifest.each() if e.runtime == runtime)


def weights(bundle: Path) -> dict[str, int]:
    files = (bundle / "onnx/weights").iterdir()
    return {file.name: file.stat().st_size for file in files}


def test_weights_are_in_the_bundle_once(built: Built) -> None:
    one, other = built("onnxruntime"), built("openvino")
    both = built("onnxruntime", "openvino")
    size = {b: sum(len(data) for data in tree(b).values()) for b in (one, other, both)}
    assert weights(one) == weights(other) == weights(both)
    shared = sum(weights(both).values())
    assert shared > 1_000_000
    assert size[both] < size[one] + size[other] - 0.95 * shared
    # The first one's files are called as if there were no other.
    assert {path for path in tree(one) if path != "fluxdeploy.json"} < tree(both).keys()


def test_each_edition_is_that_of_a_bundle_of_its_own(built: Built) -> None:
    both = built("onnxruntime", "openvino")
    for runtime in ("onnxruntime", "openvino"):
        alone = open_bundle(built(runtime)).manifest
        joined = edition(both, runtime)
        assert joined.quality == alone.quality
        assert joined.defaults == alone.defaults
        assert joined.provenance == alone.provenance
        assert joined.components.keys() == alone.components.keys()
        for name, record in joined.components.items():
            same = alone.components[name]
            assert (record.precision, record.compute) == (same.precision, same.compute)
            assert [(e.runtime, e.target, e.dimensions) for e in record.engines] == [
                (e.runtime, e.target, e.dimensions) for e in same.engines
            ]
            assert {f.sha256 for f in record.files} == {f.sha256 for f in same.files}


def test_a_runtime_joins_a_bundle_of_the_same_checkpoint(
    tmp_path: Path, source: Path, built: Built, traces: Traces
) -> None:
    """And what comes out is what one build of both makes."""
    bundle = tmp_path / "bundle"
    shutil.copytree(built("onnxruntime"), bundle)
    before = {path: (bundle / path).stat().st_ino for path in tree(bundle)}
    result = run(
        *("build", source, "--precision", "fp32", "--runtime", "openvino", "--target", "cpu"),
        *("--out", bundle),
    )
    assert result.exit_code == 0, result.output
    assert "onnxruntime: its edition stays" in result.stderr
    assert tree(bundle) == tree(built("onnxruntime", "openvino"))
    assert before.keys() - tree(bundle).keys() == set()
    assert result.stdout.splitlines() == [
        f'{bundle} is ready: fluxdeploy generate "a prompt" --bundle {bundle}',
        "  onnxruntime on cpu: `generate` takes it here",
        "  openvino on cpu: runs here with --runtime openvino",
    ]
    traces.components.clear()
    build_bundle(request_for(source, "openvino", "onnxruntime"), bundle)
    assert traces.components == []
    assert tree(bundle) == tree(built("onnxruntime", "openvino"))


def test_only_the_edition_that_is_asked_for_is_made_anew(both: Path, source: Path) -> None:
    kept = edition(both, "openvino")
    request = replace(request_for(source, "onnxruntime"), component_precision={"clip": "fp16"})
    build_bundle(request, both)
    assert names(both) == ["onnxruntime", "openvino"]
    assert edition(both, "openvino") == kept
    assert edition(both, "onnxruntime").components["clip"].precision == "fp16"
    open_bundle(both, check="all")


def test_converted_weights_with_the_same_bytes_are_one_file(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As ONNX Runtime, it then computes in float32 around them, on every processor.
    monkeypatch.setattr("engines.openvino._has_bf16", lambda: False)
    bundle, given = tmp_path / "bundle", {"t5": "int8-weights"}
    request = request_for(source, "onnxruntime", "openvino")
    request = replace(request, component_precision=given, promise=Promise())
    build_bundle(request, bundle)

    def packed(runtime: str) -> list[str]:
        files = edition(bundle, runtime).components["t5"].files
        return [file.path for file in files if ".int8-weights." in file.path]

    (path,) = packed("onnxruntime")
    assert packed("openvino") == [path]
    (digest,) = {r.sha256 for _, r in open_bundle(bundle).manifest.files() if r.path == path}
    assert path == f"onnx/weights/t5.int8-weights.{digest[:12]}.safetensors"
    # It is the other's still, where one of them has it no more.
    build_bundle(request_for(source, "onnxruntime"), bundle)
    assert packed("onnxruntime") == []
    assert packed("openvino") == [path]
    with FluxPipeline.from_bundle(bundle, "openvino") as pipe:
        pipe.warm_up()


def test_replace_keeps_nothing(both: Path, source: Path, built: Built) -> None:
    build_bundle(replace(request_for(source, "openvino"), replace=True), both)
    assert tree(both) == tree(built("openvino"))


def test_a_bundle_of_another_checkpoint_is_replaced(
    tmp_path: Path, both: Path, source: Path, built: Built
) -> None:
    other = tmp_path / "another name"
    shutil.copytree(source, other)
    build_bundle(request_for(other, "openvino"), both)
    assert names(both) == ["openvino"]


def test_other_weights_under_the_same_name_do_not_join(
    tmp_path: Path, both: Path, source: Path
) -> None:
    other = tmp_path / source.name
    shutil.copytree(source, other)
    rewrite(next((other / "vae").glob("*.safetensors")), "F32", 0.5)
    before = tree(both)
    with pytest.raises(BundleError) as refused:
        build_bundle(request_for(other, "openvino"), both)
    assert str(refused.value) == (
        f"The onnxruntime edition of {both} was made from other weights than these, under the same "
        "name. Build it too, with --runtime onnxruntime, leave it out, with --replace, or choose "
        "another --out."
    )
    assert tree(both) == before
    build_bundle(request_for(other, "openvino", "onnxruntime"), both)
    assert names(both) == ["onnxruntime", "openvino"]


def test_a_broken_edition_does_not_stay(both: Path, source: Path) -> None:
    (both / "golden/t5.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"onnxruntime edition of .* its t5 are missing or chang"):
        build_bundle(request_for(source, "openvino"), both)
    build_bundle(request_for(source, "openvino", "onnxruntime"), both)
    open_bundle(both, check="all")


def test_a_build_that_dies_in_its_second_edition_goes_on_there(
    tmp_path: Path, source: Path, built: Built, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, before = tmp_path / "bundle", built("onnxruntime")
    shutil.copytree(before, bundle)
    describe, described = builder.describe, []

    def fail(*arguments: object) -> Manifest:
        described.append(arguments)
        if len(described) == 2:
            raise OSError("enough")
        return describe(*arguments)  # type: ignore[arg-type]

    request = replace(request_for(source, "openvino", "onnxruntime"), replace=True)
    with monkeypatch.context() as patch:
        patch.setattr(builder, "describe", fail)
        with pytest.raises(OSError, match="enough"):
            build_bundle(request, bundle)
    assert tree(bundle) == tree(before)
    traces.components.clear()
    build_bundle(request, bundle)
    assert traces.components == []
    assert tree(bundle) == tree(built("openvino", "onnxruntime"))


def test_the_pipeline_runs_one_edition(built: Built) -> None:
    both = built("onnxruntime", "openvino")
    pictures = {}
    for runtime, taken in (("auto", "onnxruntime"), ("openvino", "openvino")):
        with FluxPipeline.from_bundle(both, runtime) as pipe:
            assert pipe.bundle.manifest.runtime == taken
            assert not pipe.bundle.manifest.editions
            made = pipe("a fox", seed=0, num_inference_steps=2, output_type="np").images
            opened = pipe._components.engine("transformer")
            assert type(opened).__module__ == f"engines.{taken}"
        pictures[taken] = np.asarray(made)
    assert np.abs(pictures["onnxruntime"] - pictures["openvino"]).max() < 0.05


def test_verify_looks_at_the_edition_that_is_asked_for(built: Built, source: Path) -> None:
    both = built("onnxruntime", "openvino")
    progress = Progress(quiet=True)
    for runtime in ("auto", "openvino"):
        assert verify(both, None, runtime, EngineOptions(), progress).passed
    report = run("verify", "--bundle", both, "--runtime", "native", "--json")
    assert report.exit_code == 1
    assert "has no edition for --runtime native" in report.stderr


def test_inspect_lists_every_edition(both: Path) -> None:
    shown = run("inspect", both).stdout
    assert "Edition for onnxruntime on cpu, runs here" in shown
    assert "Edition for openvino on cpu, runs here" in shown
    assert " alone: onnxruntime " in " ".join(shown.split())
    held = json.loads(run("inspect", both, "--json").stdout)["manifest"]
    assert len(held["editions"]) == 1


def test_refit_refuses_several_editions(both: Path, source: Path) -> None:
    result = run("refit", both, "--checkpoint", source)
    assert result.exit_code == 2
    assert "has editions for onnxruntime, openvino" in result.stderr


def test_a_plan_tells_what_is_shared_and_what_stays(
    tmp_path: Path, built: Built, source: Path
) -> None:
    common = ("plan", source, "--precision", "fp32", "--target", "cpu", "--json")
    runtimes = ("--runtime", "onnxruntime", "--runtime", "openvino")
    report = json.loads(run(*common, *runtimes, "--out", tmp_path / "new").stdout)
    (other,) = report["editions"]
    assert (report["runtime"], other["runtime"]) == ("onnxruntime", "openvino")
    held = sum(weights(built("onnxruntime")).values())
    assert (report["disk"]["shared"], other["disk"]["shared"]) == (0, held)
    assert report["kept"] == []
    out = ("--out", built("onnxruntime"))
    report = json.loads(run(*common, "--runtime", "openvino", *out).stdout)
    assert (report["disk"]["shared"], report["kept"]) == (held, ["onnxruntime"])
    told = " ".join(run(*common[:-1], "--runtime", "openvino", *out).stdout.split())
    assert "of weights that another edition has too" in told
    assert f"The onnxruntime edition at {out[1]} stays." in told


def test_what_runs_nowhere_here_joins_what_does_and_does_not_replace_it(
    built: Built, source: Path, both: Path
) -> None:
    elsewhere = ("--runtime", "onnxruntime", "--target", "cuda", "--precision", "fp32")
    assert run("plan", source, *elsewhere, "--out", built("openvino")).exit_code == 0
    assert run("plan", source, *elsewhere, "--out", both).exit_code == 0, "OpenVINO's stays"
    refused = run("plan", source, *elsewhere, "--out", built("onnxruntime"))
    assert refused.exit_code == 1
    assert "holds a bundle that runs on this machine" in " ".join(refused.stdout.split())
