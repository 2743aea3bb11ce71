"""All-in-one files as ComfyUI saves them, and the folder that has what a single file lacks."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch
from safetensors.torch import load_file, save_file

from engines import choose_runtime
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.checkpoint.contents import contents_of
from exporters.checkpoint.tensors import StoredTensor, read_entries
from exporters.checkpoint.text_configs import text_config
from exporters.components.registry import COMPONENTS
from exporters.export import check_all_used, specify
from exporters.synthetic.sparse_checkpoint import FLUX_DEV, declare_tensors
from fluxdeploy.build.checkpoint import check_family
from fluxdeploy.build.prepare import prepare
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.errors import BundleError, CheckpointError
from tests.exporters.conftest import (
    Tensors,
    assert_equal_weights,
    edit_json,
    edit_tensors,
)

PREFIXES = {
    "flux1.safetensors": "model.diffusion_model.",
    "ae.safetensors": "vae.",
    "text_encoder/model.safetensors": "text_encoders.clip_l.transformer.text_model.",
    "text_encoder_2/model.safetensors": "text_encoders.t5xxl.transformer.",
}
PARTS = ("transformer", "vae", "clip", "t5")


def all_in_one(bfl: Path, target: Path, vae: str = "vae.") -> Path:
    """The tensors of a checkpoint in BFL's layout in one file, as ComfyUI names them."""
    tensors: Tensors = {
        # What its wrappers around text encoders have beside.
        "text_encoders.clip_l.logit_scale": torch.tensor(4.6),
        "text_encoders.clip_l.transformer.text_projection.weight": torch.eye(40),
        "text_encoders.t5xxl.logit_scale": torch.tensor(4.6),
    }
    for file, prefix in PREFIXES.items():
        prefix = vae if prefix == "vae." else prefix
        tensors |= {f"{prefix}{name}": t for name, t in load_file(bfl / file).items()}
    target.mkdir()
    save_file(tensors, target / "flux1-dev-fp8.safetensors")
    # How RoPE splits heads of another size than FLUX.1's is not in the tensors.
    shutil.copy(bfl / "config.json", target)
    return target / "flux1-dev-fp8.safetensors"


@pytest.fixture(scope="module")
def file(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An all-in-one file, not to be written to."""
    return all_in_one(checkpoint("dev", "bfl"), tmp_path_factory.mktemp("one") / "folder")


@pytest.fixture
def own(file: Path, tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(file.parent, tmp_path / "one")) / file.name


def assert_whole(read: Checkpoint, opened: Checkpoint) -> None:
    for part in PARTS:
        weights = read.part(part).weights
        spare = {"text_model.text_projection.weight", "text_model.logit_scale", "logit_scale"}
        kept = {name: stored for name, stored in weights.items() if name not in spare}
        assert_equal_weights(kept, opened.part(part).weights)
    assert read.transformer == opened.transformer
    assert read.vae == opened.vae
    assert read.clip.to_dict() == opened.clip.to_dict()
    assert read.t5.to_dict() == opened.t5.to_dict()
    assert read.schedule == opened.schedule
    assert read.tokenizers == opened.tokenizers


@pytest.mark.parametrize("vae", ["vae.", "first_stage_model."])
def test_all_parts_of_one_file(
    bfl: Path, source: Path, opened: Checkpoint, tmp_path: Path, vae: str
) -> None:
    path = all_in_one(bfl, tmp_path / "folder", vae)
    assert contents_of(read_entries(path)).parts == set(PARTS)
    read = open_checkpoint(path, source)
    assert_whole(read, opened)
    assert {file.name for file in read.files} == {path.name}
    check_family(read)
    specs = [specify(read, COMPONENTS[name], "fp32") for name in COMPONENTS]
    check_all_used(read, specs, COMPONENTS)


def test_the_vae_is_named_as_diffusers_names_it(file: Path, opened: Checkpoint) -> None:
    """And has the shapes that its own conversion of such files gives."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    tensors = {n: t for n, t in load_file(file).items() if n.startswith("vae.")}
    converted = convert_ldm_vae_checkpoint(tensors, dict(opened.part("vae").config))
    weights = open_checkpoint(file, opened.root).part("vae").weights
    assert weights.keys() == converted.keys()
    for name, stored in weights.items():
        assert (stored.read() == converted[name].numpy().reshape(-1)).all(), name


def test_without_tokenizers_a_base_is_asked_for(file: Path) -> None:
    read = open_checkpoint(file)
    with pytest.raises(CheckpointError, match=r"no tokenizer for clip: .*--base"):
        read.tokenizer("clip")


def test_the_plan_of_a_file_with_a_base(file: Path, source: Path, tmp_path: Path) -> None:
    asked = BuildRequest(str(file), targets=("cpu",), base=source)
    builders = [choose_runtime("onnxruntime", ("cpu",))]
    ready = prepare(asked, tmp_path / "bundle", builders)
    (spec,), (plan,) = ready.specs, ready.plans
    assert not plan.problems
    assert spec.checkpoint.tokenizers["t5"] == source / "tokenizer_2"
    with pytest.raises(BundleError, match="overlap"):
        prepare(asked, source / "tokenizer", builders)
    with pytest.raises(CheckpointError, match="no tokenizer for clip"):
        prepare(dataclasses.replace(asked, base=None), tmp_path / "bundle", builders)


def test_what_a_base_has_not(file: Path, tmp_path: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"The base .*none is no folder"):
        open_checkpoint(file, tmp_path / "none")
    with pytest.raises(CheckpointError, match="has all parts of its own: leave out the base"):
        open_checkpoint(source, source)


def test_a_transformer_alone_takes_all_else_from_the_base(
    bfl: Path, source: Path, opened: Checkpoint, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(bfl / "flux1.safetensors", alone)
    shutil.copy(bfl / "config.json", alone)
    assert_whole(open_checkpoint(alone / "flux1.safetensors", source), opened)
    with pytest.raises(CheckpointError, match=r"no vae: .*--base"):
        open_checkpoint(alone / "flux1.safetensors").part("vae")
    # What stands beside it goes before the base.
    shutil.copy(bfl / "ae.safetensors", alone)
    edit_tensors(alone / "ae.safetensors", lambda tensors: tensors["decoder.conv_in.bias"].mul_(2))
    vae = open_checkpoint(alone / "flux1.safetensors", source).part("vae").weights
    assert {stored.file for stored in vae.values()} == {alone / "ae.safetensors"}


def test_the_schedule_of_a_base_of_the_other_kind(
    file: Path, source: Path, opened: Checkpoint, tmp_path: Path
) -> None:
    """Dev's folder does as the base of schnell, whose encoders and VAE are the same."""
    base = Path(shutil.copytree(source, tmp_path / "base"))
    edit_json(base / "scheduler/scheduler_config.json", base_shift=0.7)
    assert open_checkpoint(file, base).schedule.base_shift == 0.7
    edit_json(base / "transformer/config.json", guidance_embeds=False)
    read = open_checkpoint(file, base)
    assert read.schedule.base_shift == 0.5
    assert any("one of a FLUX.1-schnell and not followed" in notice for notice in read.notices)


def test_scaled_fp8_as_comfyui_saves_it(own: Path, source: Path, opened: Checkpoint) -> None:
    """Weights of the blocks are divided by a scale each, which stands beside them."""
    exact: dict[str, np.ndarray] = {}
    tensors = load_file(own)
    for name, tensor in list(tensors.items()):
        prefixed = name.startswith(("model.diffusion_model.", "text_encoders.t5xxl."))
        if prefixed and name.endswith(".weight") and tensor.ndim == 2 and "bias" not in name:
            scale = tensor.abs().max() / 448
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{name.removesuffix('.weight')}.scale_weight"] = scale.reshape(1)
            exact[name] = (tensors[name].float() * scale).numpy()
    for prefix in ("model.diffusion_model.", "text_encoders.t5xxl.transformer."):
        tensors[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, own)
    read = open_checkpoint(own, source)
    assert read.rounded == {"transformer": ("F8_E4M3",), "t5": ("F8_E4M3",)}
    assert not [notice for notice in read.notices if "widened" in notice]
    proj = exact["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"]
    key = "transformer_blocks.0.attn.to_k.weight"
    assert (read.part("transformer").weights[key].read().reshape(96, 96) == proj[96:192]).all()
    wo = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    expected = exact[f"text_encoders.t5xxl.transformer.{wo}"]
    assert (read.part("t5").weights[wo].read() == expected.reshape(-1)).all()


def test_a_tensor_of_no_part_is_refused(own: Path, source: Path) -> None:
    edit_tensors(own, lambda tensors: tensors.update({"denoiser.sigmas": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"Tensor denoiser\.sigmas in .* is of no part"):
        open_checkpoint(own, source)


def test_a_second_encoder_beside_has_to_be_the_same(
    own: Path, bfl: Path, source: Path, opened: Checkpoint
) -> None:
    beside = own.parent / "clip_l.safetensors"
    shutil.copy(bfl / "text_encoder/model.safetensors", beside)
    assert {s.file for s in open_checkpoint(own, source).part("clip").weights.values()} == {own}
    edit_tensors(beside, lambda t: t["encoder.layers.0.mlp.fc1.weight"].mul_(1.5))
    with pytest.raises(CheckpointError, match="two different text encoders, in"):
        open_checkpoint(own, source)


def test_another_all_in_one_file_beside_is_left_aside(own: Path, source: Path) -> None:
    other = own.parent / "other.safetensors"
    shutil.copy(own, other)
    edit_tensors(other, lambda tensors: [t.mul_(2) for t in tensors.values()])
    assert set(open_checkpoint(own, source).files) == {own}


# Text encoders without a config.


def known_shapes(name: str) -> dict[str, StoredTensor]:
    """The tensors of FLUX.1's own encoder, without their bytes."""
    return {
        key: StoredTensor(Path("x"), key, dtype, tuple(shape), 0, 0)
        for key, dtype, shape in declare_tensors(FLUX_DEV, name)
    }


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_configs_of_the_encoders_that_flux_has(name: str) -> None:
    weights = known_shapes(name)
    expected = getattr(FLUX_DEV, name).to_dict()
    found = text_config(name, weights, {}).to_dict()
    # Neither is of the network that makes embeddings.
    for key in ("bos_token_id", "projection_dim"):
        found[key] = expected[key] = None
    assert found == expected
    last = "text_model.encoder.layers.11." if name == "clip" else "encoder.block.23."
    shorter = {key: stored for key, stored in weights.items() if not key.startswith(last)}
    longer = weights | {
        key.replace(last, last.replace("11", "12").replace("23", "24")): stored
        for key, stored in weights.items()
        if key.startswith(last)
    }
    for wrong in (shorter, longer):
        with pytest.raises(CheckpointError, match=r"whose config is known.*Put its config\.json"):
            text_config(name, wrong, {})


def test_clip_with_more_positions_is_not_guessed() -> None:
    key = "text_model.embeddings.position_embedding.weight"
    weights = known_shapes("clip")
    weights[key] = StoredTensor(Path("x"), key, "F32", (248, 768), 0, 0)
    with pytest.raises(CheckpointError, match=r"is not CLIP-L.*\[248, 768\]"):
        text_config("clip", weights, {})
