"""Which files of a folder are read: names, variants, indexes, and parts that stand there twice."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.checkpoint.weight_files import Chosen, choose
from fluxdeploy.errors import CheckpointError
from tests.exporters.conftest import (
    TRANSFORMER,
    VAE,
    Tensors,
    assert_equal_weights,
    edit_tensors,
)

CLIP = "text_encoder/model.safetensors"
T5 = "text_encoder_2/model.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


def shard(copy: Path, variant: str = "") -> dict[str, str]:
    """Split the transformer into two shards and an index; returns the index's map."""
    tensors = load_file(copy / TRANSFORMER)
    (copy / TRANSFORMER).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model{variant}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, copy / "transformer" / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(copy / INDEX, weight_map)
    return weight_map


def write_index(path: Path, weight_map: dict[str, str]) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Names.


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors", "config.json"], "model.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "model.fp16.safetensors"),
        (["flux_vae.sft", "config.json"], "flux_vae.sft"),
        (["model-00001-of-00001.safetensors"], "model-00001-of-00001.safetensors"),
        (["._model.safetensors", "model.safetensors"], "model.safetensors"),
    ],
)
def test_the_one_weight_file_of_a_folder(names: list[str], chosen: str) -> None:
    assert choose("vae", names) == Chosen(None, (chosen,))


@pytest.mark.parametrize(
    "index",
    [
        "model.safetensors.index.json",
        "model.safetensors.index.fp16.json",
        "model.fp16.safetensors.index.json",
        "model.safetensors.fp16.index.json",
        "diffusion_pytorch_model.safetensors.index.bf16.json",
    ],
)
def test_names_of_indexes(index: str) -> None:
    variant = {"fp16": ".fp16", "bf16": ".bf16"}.get(
        next((v for v in ("fp16", "bf16") if v in index), ""), ""
    )
    shards = [f"model{variant}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert choose("transformer", [index, *shards, "config.json"]) == Chosen(index, ())
    legacy = [f"model-0000{n}-of-00002{variant}.safetensors" for n in (1, 2)]
    assert choose("transformer", [index, *legacy]) == Chosen(index, ())


def test_a_variants_index_beside_the_plain_one_is_not_read() -> None:
    names = ["model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    others = [
        "model.safetensors.index.fp16.json",
        "model.fp16-00001-of-00002.safetensors",
        "model.fp8.safetensors",
    ]
    assert choose("x", names + others) == Chosen(names[0], ())


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model.fp16.safetensors", "model.bf16.safetensors"], "several variants"),
        (["a.safetensors", "b.safetensors"], "several weight files and no index: a.s.*, b.s"),
        (["model-00001-of-00002.safetensors"], "a part of the weights, and no index"),
        ([f"model-0000{n}-of-00002.safetensors" for n in (1, 2)], "several weight files"),
        (["a.safetensors.index.json", "b.safetensors.index.json"], "several indexes"),
        (["model.gguf"], "GGUF"),
        (["pytorch_model.bin"], "pickles"),
        (["config.json"], "no safetensors file"),
    ],
)
def test_folders_without_one_choice(names: list[str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        choose("text_encoder", names)


@pytest.mark.parametrize("files", [("flux1-schnell.sft", "ae.sft"), ("flux1-dev.sft", "ae.sft")])
def test_first_names_of_black_forest_labs(
    bfl: Path, opened: Checkpoint, files: tuple[str, str]
) -> None:
    for old, new in zip(("flux1.safetensors", "ae.safetensors"), files, strict=True):
        (bfl / old).rename(bfl / new)
    for path in (bfl, bfl / files[0]):
        read = open_checkpoint(path)
        for part in ("transformer", "vae"):
            assert_equal_weights(read.part(part).weights, opened.part(part).weights)


@pytest.mark.parametrize("name", ["nobody/flux.safetensors", "nobody/ae.sft", "nobody/q.gguf"])
def test_a_missing_file_is_no_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        open_checkpoint(name)


# Indexes.


def test_shards_of_a_variant(copy: Path, opened: Checkpoint) -> None:
    shard(copy, ".fp16")
    (copy / INDEX).rename(copy / INDEX.replace("index.json", "index.fp16.json"))
    read = open_checkpoint(copy).part("transformer").weights
    assert_equal_weights(read, opened.part("transformer").weights)


def promised(weight_map: dict[str, str]) -> dict[str, str]:
    return weight_map | {"transformer_blocks.2.ff.net.2.bias": weight_map["proj_out.bias"]}


def unlisted(weight_map: dict[str, str]) -> dict[str, str]:
    return {name: file for name, file in weight_map.items() if name != "proj_out.bias"}


def elsewhere(weight_map: dict[str, str]) -> dict[str, str]:
    first, second = sorted(set(weight_map.values()))
    return weight_map | {
        "proj_out.bias": {first: second, second: first}[weight_map["proj_out.bias"]]
    }


def swapped(weight_map: dict[str, str]) -> dict[str, str]:
    first, second = sorted(set(weight_map.values()))
    return {name: {first: second, second: first}[file] for name, file in weight_map.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (promised, "transformer_blocks.2.ff.net.2.bias is in .*, which does not hold it"),
        (unlisted, "proj_out.bias in .*0000[12]-of-00002.* is not in .*index.json"),
        (elsewhere, "proj_out.bias is in .*-of-00002.*, and it is in"),
        (swapped, "says that tensor .*, and it is in"),
        (lambda _: {}, "no weight_map"),
    ],
)
def test_an_index_that_the_shards_contradict(
    copy: Path, change: Callable[[dict[str, str]], dict[str, str]], words: str
) -> None:
    weight_map = shard(copy)
    write_index(copy / INDEX, change(weight_map))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(copy)
    assert INDEX.rpartition("/")[2] in str(caught.value)


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_an_index_may_list_all_names_of_the_embedding(copy: Path, name: str) -> None:
    part = copy / "text_encoder_2"
    names = dict.fromkeys(load_file(part / "model.safetensors"), "model.safetensors")
    write_index(part / "model.safetensors.index.json", {**names, name: "model.safetensors"})
    assert open_checkpoint(copy).t5.num_layers == 2
    write_index(part / "model.safetensors.index.json", {**names, "x": "model.safetensors"})
    with pytest.raises(CheckpointError, match="tensor x is in"):
        open_checkpoint(copy)


def test_shards_beside_a_whole_file(copy: Path) -> None:
    whole = (copy / TRANSFORMER).read_bytes()
    shard(copy)
    (copy / TRANSFORMER).write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"weights twice: in diffusion_pytorch_model.safe"):
        open_checkpoint(copy)


# Parts that stand there twice.


def halve(tensors: Tensors) -> None:
    name = "decoder.mid.block_1.conv2.weight"
    name = name if name in tensors else "decoder.mid_block.resnets.0.conv2.weight"
    tensors[name] = tensors[name] / 2


def narrow(tensors: Tensors) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


def put_beside(bfl: Path, source: Path) -> Path:
    shutil.copy(bfl / "ae.safetensors", bfl / "second.safetensors")
    return bfl / "second.safetensors"


def put_inside(bfl: Path, source: Path) -> Path:
    vae = {f"vae.{name}": t for name, t in load_file(bfl / "ae.safetensors").items()}
    edit_tensors(bfl / "flux1.safetensors", lambda tensors: tensors.update(vae))
    return bfl / "ae.safetensors"


def put_in_the_folder(bfl: Path, source: Path) -> Path:
    shutil.copy(source / VAE, bfl / "vae")
    return bfl / VAE


@pytest.mark.parametrize(
    ("second", "whole_folder"),
    [(put_beside, True), (put_beside, False), (put_inside, False), (put_in_the_folder, False)],
)
def test_a_second_vae_has_to_be_the_same(
    bfl: Path, source: Path, second: Callable[[Path, Path], Path], whole_folder: bool
) -> None:
    path = bfl if whole_folder else bfl / "flux1.safetensors"
    expected = open_checkpoint(path).part("vae").weights
    file = second(bfl, source)
    assert_equal_weights(open_checkpoint(path).part("vae").weights, expected)
    edit_tensors(file, narrow)
    open_checkpoint(path)
    edit_tensors(file, halve)
    with pytest.raises(CheckpointError, match=r"two different VAEs, in .* and in .*: leave"):
        open_checkpoint(path)


@pytest.mark.parametrize("latents", [4, 8, 32])
def test_a_vae_of_other_latents_beside_is_not_taken(bfl: Path, latents: int) -> None:
    def resize(tensors: Tensors) -> None:
        tensors["decoder.conv_in.weight"] = torch.ones(32, latents, 3, 3)

    shutil.copy(bfl / "ae.safetensors", bfl / "sd-vae.safetensors")
    edit_tensors(bfl / "sd-vae.safetensors", resize)
    assert bfl / "sd-vae.safetensors" not in open_checkpoint(bfl).files
    (bfl / "ae.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"sd-vae.safetensors .* of {latents} latent"):
        open_checkpoint(bfl).part("vae")


def test_diffusers_folders_go_before_files_beside_them(
    copy: Path, bfl: Path, opened: Checkpoint
) -> None:
    """As in diffusers: black-forest-labs/FLUX.1-dev itself holds both."""
    for name in ("flux1.safetensors", "ae.safetensors"):
        edit_tensors(bfl / name, lambda tensors: tensors.update({"x": torch.zeros(1)}))
        shutil.copy(bfl / name, copy)
    read = open_checkpoint(copy)
    assert read.layout == "diffusers"
    assert_equal_weights(read.part("vae").weights, opened.part("vae").weights)


@pytest.mark.parametrize(("file", "part"), [(CLIP, "clip"), (T5, "t5")])
def test_single_text_encoders_beside(bfl: Path, opened: Checkpoint, file: str, part: str) -> None:
    (bfl / file).rename(bfl / "encoder.safetensors")
    read = open_checkpoint(bfl)
    assert_equal_weights(read.part(part).weights, opened.part(part).weights)
    assert getattr(read, part).to_dict() == getattr(opened, part).to_dict()
    shutil.rmtree((bfl / file).parent)
    with pytest.raises(
        CheckpointError, match=r"no config\.json .* whose config is known"
    ) as caught:
        getattr(open_checkpoint(bfl), part)
    assert f"Put its config.json into {Path(file).parent}/" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("file", [CLIP, T5])
def test_a_second_text_encoder_has_to_be_the_same(bfl: Path, file: str, dtype: Any) -> None:
    beside = bfl / "encoder.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(bfl / file).items()}
    save_file(tensors, beside)
    open_checkpoint(bfl)
    name = next(
        name for name in tensors if name.endswith(("fc1.weight", "DenseReluDense.wo.weight"))
    )
    save_file(tensors | {name: (tensors[name].float() * 1.5).to(dtype)}, beside)
    with pytest.raises(CheckpointError, match="two different text encoders, in") as caught:
        open_checkpoint(bfl)
    assert str(beside) in str(caught.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_lora_of_peft_in_a_parts_folder(copy: Path, part: str) -> None:
    (copy / part / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{part} holds a LoRA that was not merged"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("file", "name", "words"),
    [
        (T5, "encoder.block.0.layer.0.SelfAttention.q.weight._data", "T5.*Quanto"),
        (CLIP, "text_model.encoder.layers.0.mlp.fc1.SCB", "clip.*bitsandbytes"),
        (CLIP, "text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "clip.*LoRA"),
        (VAE, "decoder.conv_in.weight.absmax", "vae.*bitsandbytes"),
        (TRANSFORMER, "proj_out.lora_A.default.weight", "transformer.*LoRA"),
    ],
)
def test_foreign_tensors_in_a_parts_folder(copy: Path, file: str, name: str, words: str) -> None:
    edit_tensors(copy / file, lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=re.escape(name)) as caught:
        open_checkpoint(copy)
    assert re.search(words, str(caught.value), re.IGNORECASE)


# Values.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_not_finite(copy: Path, value: float, dtype: Any) -> None:
    name = "transformer_blocks.1.ff.net.2.weight"

    def spoil(tensors: Tensors) -> None:
        tensor = tensors[name].clone()
        tensor[5, 7] = value
        tensors[name] = tensor.to(dtype)

    edit_tensors(copy / TRANSFORMER, spoil)
    weights = open_checkpoint(copy).part("transformer").weights
    with pytest.raises(CheckpointError, match="the checkpoint is broken") as caught:
        weights[name].read()
    assert f"Tensor {name} holds NaN or infinity in {copy / TRANSFORMER}" in str(caught.value)
    assert np.isfinite(weights["proj_out.weight"].read()).all()
