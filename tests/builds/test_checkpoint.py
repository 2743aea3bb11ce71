"""The checkpoints that come with the package, and their names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluxdeploy.build.checkpoint import check_family, find_checkpoint, limits
from fluxdeploy.build.describe import describe
from fluxdeploy.bundle.manifest import ComponentRecord, DimensionRange, EngineRecord
from fluxdeploy.demo import DEFAULT_CHECKPOINT, DEMO_CHECKPOINTS
from fluxdeploy.errors import UsageError

pytest.importorskip("torch")


@pytest.mark.parametrize("name", DEMO_CHECKPOINTS)
def test_the_names_open_the_folders_of_the_package(name: str) -> None:
    checkpoint = find_checkpoint(name)
    assert checkpoint.root == DEMO_CHECKPOINTS[name]
    check_family(checkpoint)
    assert checkpoint.transformer.guidance_embedding == (name == "demo:dev")


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
    with pytest.raises(UsageError, match=r"demo:large.*demo:dev and demo:schnell"):
        find_checkpoint("demo:large")


@pytest.mark.parametrize(
    ("kind", "limited"),
    [
        ("FluxKontextPipeline", True),
        ("FluxPipeline", False),
        ("FluxImg2ImgPipeline", False),
        ("FluxInpaintPipeline", False),
        (None, False),
    ],
)
def test_a_bundle_says_what_its_checkpoint_is_for_and_it_does_not_do(
    tmp_path: Path, kind: str | None, limited: bool
) -> None:
    source = DEMO_CHECKPOINTS["demo:dev"]
    checkpoint = find_checkpoint("demo:dev")
    if kind is not None:
        for folder in source.iterdir():
            if folder.is_dir():
                (tmp_path / folder.name).symlink_to(folder)
        index = json.loads((source / "model_index.json").read_text())
        (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
        checkpoint = find_checkpoint(str(tmp_path))
    limit = limits(checkpoint)
    assert (limit is not None) == limited
    provenance = _described(checkpoint).provenance
    assert provenance.get("limits") == limit
    if limited:
        assert "text to image and image to image, and not the editing" in str(limit)


def test_the_default_picture_is_the_one_that_engines_are_tuned_for() -> None:
    defaults = _described(find_checkpoint("demo:dev")).defaults
    assert (defaults.height, defaults.width) == (96, 160)


def _described(checkpoint: Any) -> Any:
    sides = {"H": DimensionRange(64, 96, 128), "W": DimensionRange(64, 160, 192)}
    engine = EngineRecord("memory", "1", "cpu", "", sides)
    record = ComponentRecord("", "fp32", "fp32", (), (), (), (engine,), None)
    request = SimpleNamespace(checkpoint=None, precision="fp32")
    spec = SimpleNamespace(checkpoint=checkpoint, request=request, schedule=None)
    run = SimpleNamespace(spec=spec, hashes=SimpleNamespace(digest="0" * 64))
    components = {"transformer": record, "vae_decoder": record}
    return describe(run, {}, components)  # type: ignore[arg-type]
