"""The checkpoints that come with the package, and their names."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from exporters.checkpoint.tasks import find_task
from exporters.components.activations import transformer_bytes
from exporters.components.registry import COMPONENTS
from fluxdeploy.build import build as build_module
from fluxdeploy.build.checkpoint import (
    check_family,
    find_checkpoint,
    hash_checkpoint,
    recorded_task,
    require_unchanged,
)
from fluxdeploy.build.describe import describe
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle.files import HashCache
from fluxdeploy.bundle.manifest import (
    ComponentRecord,
    DimensionRange,
    EngineRecord,
    PreviewSpec,
)
from fluxdeploy.bundle.tensorfile import read_header, write_sparse
from fluxdeploy.cli import main
from fluxdeploy.demo import DEFAULT_CHECKPOINT, DEMO_CHECKPOINTS
from fluxdeploy.errors import CheckpointError, UsageError
from fluxdeploy.kernels import AttentionKernels, CallSizes
from fluxdeploy.progress import Progress

pytest.importorskip("torch")


@pytest.mark.parametrize("name", DEMO_CHECKPOINTS)
def test_the_names_open_the_folders_of_the_package(name: str) -> None:
    checkpoint = find_checkpoint(name)
    assert checkpoint.root == DEMO_CHECKPOINTS[name]
    check_family(checkpoint)
    assert checkpoint.transformer.guidance_embedding == (name != "demo:schnell")


def test_the_default_is_dev() -> None:
    assert DEFAULT_CHECKPOINT == "demo:dev"
    assert find_checkpoint(None).root == DEMO_CHECKPOINTS["demo:dev"]


def test_the_models_say_what_they_were_trained_for() -> None:
    dev, schnell = (find_checkpoint(name).defaults for name in ("demo:dev", "demo:schnell"))
    for defaults in (dev, schnell):
        assert (defaults.height, defaults.width, defaults.max_sequence_length) == (128, 128, 20)
    assert (dev.num_inference_steps, schnell.num_inference_steps) == (28, 4)


@pytest.mark.parametrize("name", DEMO_CHECKPOINTS)
def test_the_weights_are_small_and_in_half_precision(name: str) -> None:
    files = list(DEMO_CHECKPOINTS[name].rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 15e6
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}, file


def test_an_unknown_name_of_the_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo:large").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"demo:large.*demo:dev, demo:schnell"):
        find_checkpoint("demo:large")


@pytest.mark.parametrize(
    ("kind", "variant", "tasks"),
    [
        ("FluxKontextPipeline", "kontext", ("text to image", "kontext")),
        ("FluxPipeline", "dev", ("text to image", "image to image", "inpainting")),
        ("FluxInpaintPipeline", "dev", ("text to image", "image to image", "inpainting")),
        (None, "dev", ("text to image", "image to image", "inpainting")),
    ],
)
def test_a_bundle_says_what_its_checkpoint_is_for(
    tmp_path: Path, kind: str | None, variant: str, tasks: tuple[str, ...]
) -> None:
    checkpoint = find_checkpoint("demo:dev")
    if kind is not None:
        checkpoint = find_checkpoint(str(_said_to_be(kind, tmp_path)))
    manifest = _described(checkpoint)
    assert (manifest.variant, manifest.tasks) == (variant, tasks)


def test_what_a_checkpoint_does_not_tell_is_said_beside_it(tmp_path: Path) -> None:
    said = find_checkpoint("demo:dev", task="kontext")
    manifest = _described(said)
    assert (manifest.variant, manifest.tasks) == ("kontext", ("text to image", "kontext"))
    assert said.defaults.guidance_scale == find_checkpoint("demo:dev").defaults.guidance_scale
    # A bundle knows it, for those that open its checkpoint again.
    assert recorded_task(SimpleNamespace(manifest=manifest)) == "kontext"  # type: ignore[arg-type]
    plain = SimpleNamespace(manifest=_described(find_checkpoint("demo:dev")))
    assert recorded_task(plain) is None  # type: ignore[arg-type]
    latents = said.latents
    assert find_task("FluxKontextPipeline", 64, 64, latents, "kontext") == "kontext"
    for pipeline, channels in ((None, 384), ("FluxFillPipeline", 384), ("FluxPipeline", 128)):
        with pytest.raises(CheckpointError, match=rf"--task kontext .* reads {channels}"):
            find_task(pipeline, channels, 64, latents, "kontext")
    found = CliRunner().invoke(main, ["plan", "demo:fill", "--task", "kontext"])
    assert found.exit_code == 1
    assert "this one reads 384, as for fill: leave out --task" in found.stderr


def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    checkpoint = find_checkpoint(str(_said_to_be("FluxFillPipeline", tmp_path)))
    with pytest.raises(CheckpointError, match=r"FluxFillPipeline, whose .* reads 384 .* 64"):
        check_family(checkpoint)


def _said_to_be(kind: str, folder: Path) -> Path:
    """The dev demo, with another class in its model_index.json."""
    source = DEMO_CHECKPOINTS["demo:dev"]
    for part in source.iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    index = json.loads((source / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
    return folder


@pytest.mark.parametrize("kernels", [AttentionKernels.PLAIN, AttentionKernels.ONNX_RUNTIME])
def test_a_bundle_says_what_memory_its_transformer_takes(kernels: AttentionKernels) -> None:
    checkpoint = find_checkpoint("demo:dev")

    def recorded(runtime: str) -> Any:
        component = SimpleNamespace(
            name="transformer",
            runtime=SimpleNamespace(name=runtime),
            targets=("cpu",),
            kernels=kernels,
            compute="fp32",
            export=SimpleNamespace(component=COMPONENTS["transformer"]),
        )
        return _described(checkpoint, component).provenance["transformer_bytes"]

    found = recorded("onnxruntime")
    expected = transformer_bytes(checkpoint, CallSizes(1, 20, 980, 28), kernels, 4)
    assert found["per_token"] * 1000 + found["per_pair_of_tokens"] * 1000**2 == expected
    assert (found["per_pair_of_tokens"] == 0) == (kernels is AttentionKernels.ONNX_RUNTIME)
    assert recorded("openvino") == {}, "not measured"


def _described(checkpoint: Any, *components: Any) -> Any:
    sides = {"H": DimensionRange(64, 96, 128), "W": DimensionRange(64, 160, 192)}
    engine = EngineRecord("memory", "1", "cpu", "", sides)
    record = ComponentRecord("", "fp32", "fp32", (), (), (), (engine,), None)
    request = SimpleNamespace(checkpoint=None, precision="fp32")
    spec = SimpleNamespace(
        components=components,
        checkpoint=checkpoint,
        request=request,
        schedule=None,
        defaults=checkpoint.defaults,
    )
    run = SimpleNamespace(spec=spec, hashes=SimpleNamespace(digest="0" * 64))
    components = {"transformer": record, "vae_decoder": record}
    return describe(run, {}, components, PreviewSpec((), ()))  # type: ignore[arg-type]


VAE = "vae/diffusion_pytorch_model.safetensors"


def _rewrite(
    path: Path, rename: str = "", pad: bool = False, dtype: str = "", drop: int = 0
) -> None:
    """Write a safetensors file of zeros again, a little otherwise."""
    tensors = [
        (t.name + rename, dtype or t.dtype, t.shape) for t in read_header(path).tensors.values()
    ]
    path.unlink()
    write_sparse(path, tensors[drop:], {"padding": "x" * 100} if pad else None)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of demo:schnell, with times of long ago and a cache of hashes for itself."""
    root = tmp_path / "checkpoint"
    shutil.copytree(DEMO_CHECKPOINTS["demo:schnell"], root)
    for file in root.rglob("*.safetensors"):
        os.utime(file, (1_600_000_000, 1_600_000_000))
    return root


@pytest.mark.parametrize(
    "change",
    [{"rename": ".x"}, {"pad": True}, {"dtype": "F16"}, {"drop": 1}, {"dtype": "F32"}],
)
def test_a_file_that_changes_between_its_header_and_its_hash_is_told(
    copy: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    checkpoint = find_checkpoint(str(copy))
    _rewrite(copy / VAE, **change)
    with pytest.raises(CheckpointError, match=f"{VAE} was changed while the checkpoint was read"):
        hash_checkpoint(checkpoint, Progress(quiet=True), HashCache(tmp_path))


@pytest.mark.parametrize("how", ["bytes", "kept time", "replaced", "linked", "touched"])
def test_a_file_that_changes_while_it_is_built_is_told(
    copy: Path, tmp_path: Path, how: str
) -> None:
    checkpoint, cache = find_checkpoint(str(copy)), HashCache(tmp_path)
    hash_checkpoint(checkpoint, Progress(quiet=True), cache)
    cache.link(copy / VAE, tmp_path / "weights")
    require_unchanged(cache)
    data = bytearray((copy / VAE).read_bytes())
    data[-1] ^= 1
    if how == "linked":
        os.link(copy / VAE, tmp_path / "other")
    elif how == "touched":
        os.utime(copy / VAE)
    else:
        if how == "replaced":
            (copy / VAE).unlink()
        (copy / VAE).write_bytes(data)
        if how == "kept time":
            os.utime(copy / VAE, (1_600_000_000, 1_600_000_000))
        with pytest.raises(CheckpointError, match=f"{VAE} was changed"):
            require_unchanged(cache)
        return
    require_unchanged(cache)


def test_a_build_from_a_file_that_changes_replaces_nothing(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make_component(*_: object) -> None:
        (copy / VAE).write_bytes(bytes((copy / VAE).stat().st_size))
        os.utime(copy / VAE, (1_600_000_000, 1_600_000_000))

    monkeypatch.setattr("fluxdeploy.build.components.make_component", make_component)
    monkeypatch.setattr(build_module, "make_tokenizer", lambda *_: None)
    monkeypatch.setattr(build_module, "describe", lambda *_: None)
    request = BuildRequest(str(copy), runtimes=("onnxruntime",))
    with pytest.raises(CheckpointError, match=f"{VAE} was changed"):
        build_module.build(request, tmp_path / "out/bundle", Progress(quiet=True))
    assert not (tmp_path / "out/bundle").exists()
