"""A Redux is recognised by its configs and tensors, and held against the transformer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import runtimes
from fluxdeploy.build.checkpoint import find_checkpoint, hash_checkpoint
from fluxdeploy.build.resolve import BuildRequest, BuildSpec, resolve
from fluxdeploy.build.sizes import SizeRange, any_size, resolution_buckets
from fluxdeploy.errors import CheckpointError
from fluxdeploy.kernels import AttentionKernels, CallSizes
from fluxdeploy.progress import Progress

pytest.importorskip("diffusers")


@pytest.fixture
def dev(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("dev"))


@pytest.fixture
def redux(redux_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Redux for `dev`, to be changed."""
    return Path(shutil.copytree(redux_folder("dev"), tmp_path / "FLUX.1-Redux-dev"))


def say(redux: Path, file: str, **changes: Any) -> None:
    """Change what a JSON file of a Redux says; None takes a key away."""
    said = {**json.loads((redux / file).read_text()), **changes}
    kept = {key: value for key, value in said.items() if value is not None}
    (redux / file).write_text(json.dumps(kept))


def resolved(checkpoint: str, redux: Path) -> BuildSpec:
    (onnxruntime,) = runtimes("onnxruntime")
    request = BuildRequest(checkpoint=checkpoint, precision="fp32", redux=redux)
    return resolve(request, find_checkpoint(checkpoint, redux=redux), onnxruntime, ("cpu",))


def test_a_redux_joins_and_leaves_the_checkpoint_what_it_is(dev: str, redux: Path) -> None:
    plain, opened = find_checkpoint(dev), find_checkpoint(dev, redux=redux)
    assert opened.redux is not None
    assert opened.redux.tokens == opened.picture_tokens == 16
    assert opened.redux.pixels.size == (31, 31)
    assert opened.parts_beside == ("redux",)
    assert not any("unknown" in each or "not known" in each for each in opened.notices)
    with Progress(quiet=True) as progress:
        digests = {hash_checkpoint(each, progress).digest for each in (plain, opened)}
    assert len(digests) == 1


def test_the_file_of_black_forest_labs_is_read(dev: str, redux: Path) -> None:
    usual = find_checkpoint(dev, redux=redux).redux
    (file,) = (redux / "image_embedder").glob("*.safetensors")
    file.rename(redux / "flux1-redux-dev.safetensors")
    shutil.rmtree(redux / "image_embedder")
    (redux / "model_index.json").unlink()
    # As in a SigLIP's own repository.
    config = redux / "feature_extractor" / "preprocessor_config.json"
    config.rename(redux / "image_encoder" / config.name)
    assert find_checkpoint(dev, redux=redux).redux == usual


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("model_index.json", {"_class_name": "FluxPipeline"}, "holds a 'FluxPipeline' and no Redux"),
    ("image_embedder/config.json", {"redux_dim": 9}, "says redux_dim 9, and its tensors say 36"),
    ("image_embedder/config.json", {"_class_name": "VAE"}, "one of a 'VAE'"),
    ("image_encoder/config.json", {"model_type": "clip"}, "says model_type 'clip'"),
    ("image_encoder/config.json", {"patch_size": 8}, "patch_embedding.weight has shape"),
    (
        "feature_extractor/preprocessor_config.json",
        {"size": {"height": 30, "width": 31}},
        "makes pictures of 31x30 pixels, and its image encoder reads 31x31",
    ),
]


@pytest.mark.parametrize(("file", "changes", "said"), CONFIGS)
def test_a_config_that_does_not_fit_is_refused(
    file: str, changes: dict[str, Any], said: str, dev: str, redux: Path
) -> None:
    say(redux, file, **changes)
    with pytest.raises(CheckpointError, match=said):
        find_checkpoint(dev, redux=redux)


def test_what_is_no_redux_is_refused(dev: str, redux: Path, tmp_path: Path) -> None:
    weights = next((redux / "image_encoder").glob("*.safetensors"))
    (tmp_path / "bare").mkdir()
    for path, said in (
        (tmp_path / "none", "does not exist"),
        (weights, "is a file. Give the folder of one"),
        (Path(dev), "holds a 'FluxPipeline'"),
        (tmp_path / "bare", "has no image_encoder/config.json"),
    ):
        with pytest.raises(CheckpointError, match=said):
            find_checkpoint(dev, redux=path)
    with pytest.raises(CheckpointError, match=r"draws nothing by itself: .* with --redux"):
        find_checkpoint(str(redux))
    shutil.rmtree(redux / "image_embedder")
    with pytest.raises(CheckpointError, match="has no image_embedder/, and no file with redux_up"):
        find_checkpoint(dev, redux=redux)


def test_one_that_was_made_for_another_transformer_is_refused(
    dev: str, redux_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(CheckpointError, match=r"text embeddings of 40, and .* reads 48"):
        find_checkpoint(dev, redux=redux_folder("schnell"))


def test_networks_that_do_not_belong_together_are_refused(
    dev: str, redux: Path, tmp_path: Path
) -> None:
    from tests.support.checkpoints import SHAPES, make_redux

    other = make_redux(tmp_path / "other", SHAPES["dev"], hidden_size=24)
    shutil.rmtree(redux / "image_encoder")
    shutil.copytree(other / "image_encoder", redux / "image_encoder")
    with pytest.raises(CheckpointError, match=r"features of 36 numbers, and .* gives 24"):
        find_checkpoint(dev, redux=redux)


@pytest.mark.parametrize("missing", ["redux_down.weight", "redux_up.bias", "redux_extra.weight"])
def test_tensors_that_are_missing_or_too_many_are_named(
    missing: str, dev: str, redux: Path
) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = (redux / "image_embedder").glob("*.safetensors")
    tensors = load_file(file)
    if tensors.pop(missing, None) is None:
        tensors[missing] = tensors["redux_up.bias"].clone()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        resolved(dev, redux)


def test_engines_take_the_longer_text_and_t5_does_not(dev: str, redux: Path) -> None:
    spec = resolved(dev, redux)
    most = {c.name: c.profiles[0]["S"].max for c in spec.components if "S" in c.profiles[0]}
    assert most == {"t5": 512, "conditioner": 528, "transformer": 528}
    assert spec.components[0].name == "redux"
    assert set(spec.component("redux").profiles[0]) == {"B"}


def test_profiles_are_tuned_for_pictures_behind_the_text(dev: str) -> None:
    opened = find_checkpoint(dev)
    defaults = replace(opened.defaults, height=64, width=64, max_sequence_length=512)
    symbols = {"B", "S", "L", "T"}
    (profile,) = resolution_buckets(
        symbols, SizeRange(), defaults, opened.latents, picture_text=729
    )
    text = profile["S"]
    assert (text.min, text.opt, text.max) == (64, 1241, 1241)
    assert profile["T"].max == profile["L"].max + 1241
    assert any_size(symbols, defaults, opened.latents, picture_text=729)["S"].max == 1241


def test_memory_of_an_encoder_grows_with_its_patches_alone(dev: str, redux: Path) -> None:
    from exporters.components.activations import redux_bytes

    opened = find_checkpoint(dev, redux=redux)
    sizes = CallSizes(1, 512, 4096, 28)
    found = redux_bytes(opened, sizes, AttentionKernels.PLAIN, 4)
    assert found == 4 * (3 * 3 * 16**2 + 16 * (6 * 36 + 3 * 52))
    assert found == redux_bytes(opened, replace(sizes, image=64), AttentionKernels.PLAIN, 4)
