"""A build as a whole: the same bytes every time, nothing made twice, nothing replaced too early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner, Result

from engines import EngineOptions
from engines.onnxruntime import OnnxRuntimeEngine
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle import open_bundle
from fluxdeploy.cli import main
from fluxdeploy.errors import BundleError, NumericError
from fluxdeploy.progress import Progress
from fluxdeploy.verify.verify import verify
from tests.builds.conftest import rewrite, tree
from tests.conftest import build_bundle

if TYPE_CHECKING:
    from exporters.components.chain import Chain
    from tests.support.traces import Traces

COMPONENTS = ["clip", "t5", "conditioner", "transformer", "vae_decoder", "vae_encoder"]

Checkpoints = Callable[..., Path]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def identities(bundle: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every component's graph."""
    files = {name: (bundle / "onnx" / f"{name}.onnx").stat() for name in COMPONENTS}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in files.items()}


ON_ANY_CPU = ("--runtime", "onnxruntime")
on_any_cpu = partial(BuildRequest, runtimes=("onnxruntime",))
"""What is built where the processor makes no difference."""


def precisions(bundle: Path) -> dict[str, str]:
    components = open_bundle(bundle).manifest.components
    return {name: record.precision for name, record in components.items()}


def test_two_processes_make_the_same_bytes(demo_bundle: Path, recorded: Path) -> None:
    first, second = tree(demo_bundle), tree(recorded / "bundle")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_remembered_traces_make_the_same_bytes(
    tmp_path: Path, recorded: Path, traces: Traces
) -> None:
    """Otherwise the tests of this folder would prove nothing."""
    build_bundle(on_any_cpu(), tmp_path / "bundle")
    assert tree(tmp_path / "bundle") == tree(recorded / "bundle")


def test_an_unchanged_bundle_is_not_made_again(
    tmp_path: Path, demo_bundle: Path, traces: Traces
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundle, bundle)
    before = identities(bundle)
    result = run("build", *ON_ANY_CPU, "--out", bundle, "--json")
    assert result.exit_code == 0, result.output
    assert traces.components == []
    assert identities(bundle) == before
    assert tree(bundle) == tree(demo_bundle)
    assert json.loads(result.stdout)["hash"] == open_bundle(demo_bundle).content_hash


def test_only_components_that_read_a_changed_file_are_made_again(
    tmp_path: Path, checkpoints: Checkpoints, traces: Traces
) -> None:
    source, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    shutil.copytree(checkpoints(), source)
    build_bundle(on_any_cpu(str(source)), bundle)
    for folder, reading in (
        ("transformer", {"conditioner", "transformer"}),
        ("vae", {"vae_decoder", "vae_encoder"}),
        # Golden tensors of the others are made of what these give.
        ("text_encoder", {"clip", "conditioner", "transformer"}),
        ("text_encoder_2", {"t5", "conditioner", "transformer"}),
    ):
        before, digest = identities(bundle), open_bundle(bundle).content_hash
        rewrite(next((source / folder).glob("*.safetensors")), scale=0.5)
        traces.components.clear()
        build_bundle(on_any_cpu(str(source)), bundle)
        after = identities(bundle)
        assert {name for name in COMPONENTS if after[name] != before[name]} == reading
        assert set(traces.components) == reading
        assert open_bundle(bundle, check="all").content_hash != digest
    build_bundle(on_any_cpu(str(source)), tmp_path / "anew")
    assert tree(tmp_path / "anew") == tree(bundle)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_checkpoint_of_any_type_builds_and_passes_its_gates(
    tmp_path: Path, checkpoints: Checkpoints, traces: Traces, dtype: str
) -> None:
    build_bundle(on_any_cpu(str(checkpoints(dtype)), precision="fp32"), tmp_path / "bundle")
    assert precisions(tmp_path / "bundle") == dict.fromkeys(COMPONENTS, "fp32")


def test_fp16_leaves_t5_and_the_vae_in_a_wide_type(
    tmp_path: Path, checkpoints: Checkpoints, traces: Traces
) -> None:
    bundle = tmp_path / "bundle"
    result = run("build", checkpoints(), "--precision", "fp16", "--out", bundle)
    assert result.exit_code == 0, result.output
    narrow = dict.fromkeys(("clip", "conditioner", "transformer"), "fp16")
    wide = dict.fromkeys(("t5", "vae_decoder", "vae_encoder"), "fp32")  # no bfloat16 on the CPU
    assert precisions(bundle) == {**narrow, **wide}
    *_, widened, ready = result.stdout.splitlines()
    assert "fp32" in widened
    assert all(name in widened for name in wide)
    assert str(bundle) in ready


def test_the_precision_of_one_component(
    tmp_path: Path, checkpoints: Checkpoints, traces: Traces
) -> None:
    bundle = tmp_path / "bundle"
    options = ("--precision", "fp32", "--component-precision", "clip=fp16")
    result = run("build", checkpoints(), *options, "--out", bundle)
    assert result.exit_code == 0, result.output
    assert precisions(bundle) == {**dict.fromkeys(COMPONENTS, "fp32"), "clip": "fp16"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--component-precision", "unet=fp16"], ["unet", "transformer"]),
        (["--component-precision", "t5=fp99"], ["fp99", "fp16"]),
        (["--component-precision", "t5"], ["t5"]),
        (["--precision", "fp99"], ["fp99", "bf16"]),
        (["--target", "sm00"], ["sm00", "cpu"]),
    ],
)
def test_unknown_names_are_usage_errors(
    tmp_path: Path, traces: Traces, options: list[str], words: list[str]
) -> None:
    result = run("build", *options, "--out", tmp_path / "bundle")
    assert result.exit_code == 2, result.output
    message = result.stderr.splitlines()[-1]
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []
    assert traces.components == []


@pytest.mark.parametrize("where", ["it", "above it", "below it"])
def test_a_bundle_does_not_replace_its_checkpoint(
    tmp_path: Path, checkpoints: Checkpoints, traces: Traces, where: str
) -> None:
    source = tmp_path / "models" / "checkpoint"
    shutil.copytree(checkpoints(), source)
    before = tree(source)
    out = {"it": source, "above it": source.parent, "below it": source / "bundle"}[where]
    result = run("build", source, "--out", out)
    assert result.exit_code == 1
    assert "overlap" in result.stderr
    assert tree(source) == before


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path, traces: Traces) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    result = run("build", "--out", tmp_path / "thesis")
    assert result.exit_code == 1
    assert "not a bundle" in result.stderr
    assert tree(tmp_path) == {"thesis/chapter.tex": b"years of work"}


def test_a_bundle_with_a_stranger_in_it_is_not_replaced(
    tmp_path: Path, demo_bundle: Path, traces: Traces
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundle, bundle)
    (bundle / "notes.txt").write_text("mine")
    result = run("build", "--out", bundle)
    assert result.exit_code == 1
    assert "notes.txt" in result.stderr
    assert (bundle / "notes.txt").read_text() == "mine"


def test_two_builds_at_one_place(
    tmp_path: Path, checkpoints: Checkpoints, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, bundle = on_any_cpu(str(checkpoints())), tmp_path / "bundle"
    refused = []

    def build_meanwhile(chain: Chain) -> object:
        with pytest.raises(BundleError, match="Another build is running") as caught:
            build_bundle(request, bundle)
        refused.append(caught.value)
        return traces(chain)

    monkeypatch.setattr("exporters.export.trace_chain", build_meanwhile)
    build_bundle(request, bundle)
    assert len(refused) == len(COMPONENTS)
    open_bundle(bundle, check="all")


@pytest.mark.parametrize("damage", ["off", "nan"])
def test_an_engine_past_its_gate_ends_the_build(
    tmp_path: Path,
    demo_bundle: Path,
    checkpoints: Checkpoints,
    traces: Traces,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundle, bundle)
    honest = OnnxRuntimeEngine.run

    def run_wrong(engine: OnnxRuntimeEngine, inputs: dict[str, np.ndarray]) -> object:
        outputs = honest(engine, inputs)
        if engine.component == "transformer":
            velocity = outputs["velocity"]
            velocity.flat[7] += np.nan if damage == "nan" else 0.01 * np.abs(velocity).max()
        return outputs

    changed = on_any_cpu(str(checkpoints(scale=0.5)))
    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeEngine, "run", run_wrong)
        with pytest.raises(NumericError, match="transformer is off PyTorch"):
            build_bundle(changed, bundle)
        assert tree(bundle) == tree(demo_bundle)
        result = run("build", checkpoints(scale=0.5), *ON_ANY_CPU, "--out", bundle)
        assert result.exit_code == 1
        assert "transformer" in result.stderr.splitlines()[-1]
    traces.components.clear()
    build_bundle(changed, bundle)
    assert tree(bundle) != tree(demo_bundle)
    # What was finished before the transformer is used again.
    assert traces.components == ["transformer", "vae_decoder", "vae_encoder"]


def test_a_folder_called_demo_is_not_taken_for_the_default(
    tmp_path: Path, checkpoints: Checkpoints, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporters.export.trace_chain", traces)
    source = shutil.copytree(checkpoints(scale=2.0), tmp_path / "demo")
    build_bundle(on_any_cpu(str(source)), tmp_path / "bundle")
    with Progress(quiet=True) as progress:
        report = verify(tmp_path / "bundle", None, "auto", EngineOptions(), progress)
    assert report.passed
    assert report.pictures is None
