"""Every layout and storage type of one checkpoint gives the same weights, sizes and constants."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from exporters.checkpoint import Checkpoint, open_checkpoint
from fluxdeploy.errors import CheckpointError
from tests.exporters.conftest import (
    TRANSFORMER,
    VAE,
    Tensors,
    assert_equal_weights,
    edit_json,
    edit_tensors,
)
from tests.support.checkpoints import SHAPES

PARTS = ("transformer", "vae", "clip", "t5")


def assert_equal_checkpoints(one: Checkpoint, other: Checkpoint) -> None:
    for part in PARTS:
        assert_equal_weights(one.part(part).weights, other.part(part).weights)
    assert one.transformer == other.transformer
    assert one.vae == other.vae
    assert one.schedule == other.schedule
    assert one.defaults == other.defaults


def test_sizes_are_those_of_the_network(opened: Checkpoint) -> None:
    shape = SHAPES["dev"]
    config = opened.transformer
    assert (config.width, config.head_dim) == (shape.heads * shape.head_dim, shape.head_dim)
    assert (config.double_blocks, config.single_blocks) == (shape.double, shape.single)
    assert (config.text_width, config.pooled_width) == (shape.text_width, shape.pooled_width)
    assert (config.in_channels, config.out_channels) == (64, 64)
    assert config.mlp_width == 4 * config.width
    assert config.axes_dims == shape.axes_dims
    assert config.guidance_embedding
    assert opened.vae.channels == shape.vae_channels
    assert opened.vae.spatial_factor == 8
    assert (opened.vae.latent_channels, opened.vae.layers) == (16, 1)


def test_sharded_weights_equal_those_of_one_file(copy: Path, opened: Checkpoint) -> None:
    folder = copy / "transformer"
    network = FluxTransformer2DModel.from_pretrained(folder)
    (copy / TRANSFORMER).unlink()
    network.save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_equal_checkpoints(open_checkpoint(copy), opened)


def test_variant_files_beside_the_plain_one_are_not_read(copy: Path, opened: Checkpoint) -> None:
    shutil.copy(copy / VAE, copy / TRANSFORMER.replace(".safetensors", ".fp16.safetensors"))
    assert_equal_checkpoints(open_checkpoint(copy), opened)


def test_bfl_folder_equals_diffusers_layout(bfl: Path, opened: Checkpoint) -> None:
    assert_equal_checkpoints(open_checkpoint(bfl), opened)


def test_bfl_file_equals_its_folder(bfl: Path, opened: Checkpoint) -> None:
    assert_equal_checkpoints(open_checkpoint(bfl / "flux1.safetensors"), opened)


def test_broken_files_beside_a_named_one_do_not_matter(bfl: Path, opened: Checkpoint) -> None:
    (bfl / "half-a-download.safetensors").write_bytes(b"\x10")
    assert_equal_checkpoints(open_checkpoint(bfl / "flux1.safetensors"), opened)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("vae", ["vae.", "first_stage_model."])
def test_one_file_with_vae(bfl: Path, opened: Checkpoint, prefix: str, vae: str) -> None:
    transformer = load_file(bfl / "flux1.safetensors")
    tensors = {prefix + name: tensor for name, tensor in transformer.items()}
    tensors |= {vae + name: t for name, t in load_file(bfl / "ae.safetensors").items()}
    for file in bfl.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, bfl / "all.safetensors")
    assert_equal_checkpoints(open_checkpoint(bfl / "all.safetensors"), opened)
    assert_equal_checkpoints(open_checkpoint(bfl), opened)


def test_diffusers_vae_beside_a_bfl_transformer(
    bfl: Path, source: Path, opened: Checkpoint
) -> None:
    (bfl / "ae.safetensors").unlink()
    shutil.copy(source / VAE, bfl / "vae")
    assert_equal_checkpoints(open_checkpoint(bfl), opened)


def test_clip_with_and_without_its_prefix(copy: Path, opened: Checkpoint) -> None:
    def toggle(tensors: Tensors) -> None:
        for name in list(tensors):
            bare = name.removeprefix("text_model.")
            tensors[bare if bare != name else f"text_model.{name}"] = tensors.pop(name)

    edit_tensors(copy / "text_encoder/model.safetensors", toggle)
    assert_equal_checkpoints(open_checkpoint(copy), opened)


def test_t5_under_the_name_of_its_embedding_in_the_encoder(copy: Path, opened: Checkpoint) -> None:
    def rename(tensors: Tensors) -> None:
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    edit_tensors(copy / "text_encoder_2/model.safetensors", rename)
    weights = open_checkpoint(copy).part("t5").weights
    expected = opened.part("t5").weights["shared.weight"].read()
    assert (weights["shared.weight"].read() == expected).all()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_storage_types_are_read_exactly(copy: Path, dtype: torch.dtype) -> None:
    expected = {k: v.to(dtype).float().numpy() for k, v in load_file(copy / TRANSFORMER).items()}

    def narrow(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    edit_tensors(copy / TRANSFORMER, narrow)
    weights = open_checkpoint(copy).part("transformer").weights
    for name in ("x_embedder.weight", "transformer_blocks.1.ff.net.2.bias"):
        stored = weights[name]
        assert (stored.read().reshape(stored.shape) == expected[name]).all()


@pytest.mark.parametrize(
    ("scale_name", "beside"),
    [("scale_weight", ("scaled_fp8", "scale_input")), ("weight_scale", ("x.comfy_quant",))],
)
def test_scaled_fp8(bfl: Path, scale_name: str, beside: tuple[str, ...]) -> None:
    """As ComfyUI stores it: a scalar beside each weight, also where the tensor is fused."""
    name = "double_blocks.1.img_attn.qkv"
    raw = load_file(bfl / "flux1.safetensors")[f"{name}.weight"].to(torch.float8_e4m3fn)

    def scale(tensors: Tensors) -> None:
        tensors[f"{name}.weight"] = raw
        tensors[f"{name}.{scale_name}"] = torch.tensor(0.37)
        tensors |= {extra: torch.zeros(2) for extra in beside}
        for key in list(tensors):
            tensors[f"model.diffusion_model.{key}"] = tensors.pop(key)

    edit_tensors(bfl / "flux1.safetensors", scale)
    weights = open_checkpoint(bfl).part("transformer").weights
    codes = raw.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    expected = codes.astype(np.float32) * np.float32(0.37)
    read = [weights[f"transformer_blocks.1.attn.to_{p}.weight"].read() for p in "qkv"]
    assert (np.concatenate(read).reshape(expected.shape) == expected).all()
    assert not any("scale" in key.rpartition(".")[2] for key in weights)


def test_a_scale_for_each_row_is_refused(bfl: Path) -> None:
    def scale(tensors: Tensors) -> None:
        tensors["img_in.scale_weight"] = torch.ones(len(tensors["img_in.bias"]))

    edit_tensors(bfl / "flux1.safetensors", scale)
    with pytest.raises(CheckpointError, match="one scale a weight is read"):
        open_checkpoint(bfl)


@pytest.mark.parametrize(
    ("head_dim", "given", "expected"),
    [
        (128, None, (16, 56, 56)),
        (128, (32, 48, 48), (32, 48, 48)),
        (24, (4, 8, 12), (4, 8, 12)),
        (24, None, "axes_dims_rope"),
        (24, (4, 8, 8), "axes_dims_rope are .* 24"),
        (24, (3, 9, 12), "even"),
        (24, (4, 8, 16, -4), "three even sizes"),
        (24, "24", "three even sizes"),
        (24, (True, 12, 12), "three even sizes"),
    ],
)
def test_rope_split(bfl: Path, head_dim: int, given: Any, expected: Any) -> None:
    def resize(tensors: Tensors) -> None:
        """Widen to one head of 128; only the sizes are read here."""
        for name, tensor in tensors.items():
            if name.endswith(("query_norm.scale", "key_norm.scale")):
                tensors[name] = torch.ones(head_dim)
            elif name == "img_in.weight":
                tensors[name] = torch.zeros(head_dim, 64)
            elif name.startswith("final_layer.adaLN") or "qkv" in name or "linear1" in name:
                rows = {"f": 2, "d": 3, "s": 7}[name[0]] * head_dim
                tensors[name] = torch.zeros(rows, *tensor.shape[1:])

    if head_dim != 24:
        edit_tensors(bfl / "flux1.safetensors", resize)
    edit_json(bfl / "config.json", axes_dims_rope=given)
    checkpoint = open_checkpoint(bfl)
    if isinstance(expected, str):
        with pytest.raises(CheckpointError, match=expected):
            _ = checkpoint.transformer
    else:
        assert checkpoint.transformer.axes_dims == expected


def test_schedule_of_a_checkpoint_without_scheduler(
    bfl: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Black Forest Labs' files have none: dev's is shifted, schnell's is not."""
    shutil.rmtree(bfl / "scheduler")
    dev = open_checkpoint(bfl).schedule
    assert dev.use_dynamic_shifting
    assert (dev.base_shift, dev.max_shift) == (0.5, 1.15)
    copy = shutil.copytree(checkpoint("schnell", "bfl"), tmp_path / "schnell")
    shutil.rmtree(copy / "scheduler")
    schnell = open_checkpoint(copy)
    assert (schnell.schedule.shift, schnell.schedule.use_dynamic_shifting) == (1.0, False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "is one of a 'EulerDiscreteScheduler'"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta"),
        ({"use_exponential_sigmas": "yes"}, "use_exponential_sigmas is 'yes'"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"num_train_timesteps": 500}, "num_train_timesteps"),
        ({"time_shift_type": "cosine"}, "exponential or linear"),
        ({"shift": "3"}, "shift is '3'"),
        ({"shift": 0}, "must be positive"),
        ({"shift_terminal": "0.1"}, "shift_terminal is '0.1'"),
        ({"base_image_seq_len": 4096}, "base_image_seq_len"),
        ({"use_dynamic_shifting": False, "base_image_seq_len": 4096}, None),
        ({"time_shift_type": "linear", "shift_terminal": 0.02}, None),
    ],
)
def test_scheduler_configs(copy: Path, changes: dict[str, Any], words: str | None) -> None:
    edit_json(copy / "scheduler/scheduler_config.json", **changes)
    checkpoint = open_checkpoint(copy)
    if words is None:
        schedule = checkpoint.schedule
        for name, value in changes.items():
            assert getattr(schedule, name) == value
    else:
        with pytest.raises(CheckpointError, match=words):
            _ = checkpoint.schedule


def test_defaults_are_the_familys(opened: Checkpoint, checkpoint: Callable[..., Path]) -> None:
    assert vars(opened.defaults) == {
        "height": 1024,
        "width": 1024,
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "max_sequence_length": 512,
        "strength": 0.6,
    }
    schnell = open_checkpoint(checkpoint("schnell")).defaults
    assert (schnell.num_inference_steps, schnell.max_sequence_length) == (4, 256)
    assert schnell.guidance_scale == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"height": 256, "guidance_scale": 2}, None),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_inference_steps": True}, "is True"),
        ({"width": 100}, "multiple of 16"),
        ({"guidance_scale": -1}, "at least 0"),
        ({"strength": 0}, "above 0 and at most 1"),
        ({"strength": 1.5}, "above 0 and at most 1"),
        ({"strength": "0.5"}, "is '0.5'"),
        ({"height": "256"}, "is '256'"),
        ([], "must be an object"),
    ],
)
def test_settings_of_the_author(copy: Path, settings: Any, words: str | None) -> None:
    edit_json(copy / "model_index.json", _fluxdeploy=settings)
    if words is None:
        defaults = open_checkpoint(copy).defaults
        assert (defaults.height, defaults.width, defaults.guidance_scale) == (256, 1024, 2)
    else:
        with pytest.raises(CheckpointError, match=words):
            _ = open_checkpoint(copy).defaults


def test_files_are_the_weight_files_that_are_read(opened: Checkpoint, source: Path) -> None:
    assert set(opened.files) == set(source.rglob("*.safetensors"))
