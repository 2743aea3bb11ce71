"""Files that are no plain FLUX.1 are told by the names, types and first bytes that they have."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("torch")

from exporters.checkpoint import open_checkpoint
from exporters.checkpoint.contents import contents_of
from exporters.checkpoint.foreign import check_config, check_part, recognise
from fluxdeploy.bundle.tensorfile import read_header, write_sparse
from fluxdeploy.errors import CheckpointError


class Entry(NamedTuple):
    dtype: str = "BF16"
    shape: tuple[int, ...] = (8, 8)


def header(*names: str, dtype: str = "BF16") -> dict[str, Entry]:
    return {name: Entry(dtype) for name in names}


BLOCK = "transformer_blocks.7.attn.to_q"
ENDS = ("x_embedder.weight", "proj_out.weight", f"{BLOCK}.weight")
BFL = ("img_in.weight", "final_layer.linear.weight", "double_blocks.3.img_attn.qkv.weight")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["double_blocks.3.img_mlp.0.SCB"], "bitsandbytes to 8 bits"),
        ([f"{BLOCK}.weight", f"{BLOCK}.weight_format"], "bitsandbytes to 8 bits"),
        ([f"{BLOCK}.weight._scale"], "Quanto"),
        (["encoder.block.2.layer.0.SelfAttention.q.weight._data"], "Quanto"),
        ([f"{BLOCK}._weight_qdata"], "torchao"),
        ([f"{BLOCK}.weight:_data"], "torchao"),
        ([f"{BLOCK}.qzeros", f"{BLOCK}.scales"], "GPTQ or AWQ"),
        ([f"{BLOCK}.W_q"], "HQQ"),
        ([f"{BLOCK}.qweight", f"{BLOCK}.wscales", f"{BLOCK}.lora_down"], "Nunchaku"),
        (["single_transformer_blocks.9.mlp_fc1.smooth_orig"], "Nunchaku"),
        (["double_blocks.3.img_mlp.0.weight_scale_2"], "4 bits"),
        ([f"{BLOCK}.weight_quantizer._amax"], "4 bits"),
        ([f"{BLOCK}.weight_packed"], "compressed-tensors"),
        ([f"{BLOCK}.scales", f"{BLOCK}.biases"], "MLX"),
        ([f"{BLOCK}.weight_scale_inv"], "blocks of FP8"),
    ],
)
def test_quantized_weights(names: list[str], words: str) -> None:
    found = recognise(header(*ENDS, *names))
    assert found is not None
    assert (found.role, words in str(found)) == ("quantized", True)
    assert found.tensor in names
    assert "Quantized weights are not read" in found.advice


@pytest.mark.parametrize("dtype", ["I8", "U8", "U32", "F4", "F8_E8M0"])
def test_weights_of_a_type_that_only_quantizers_write(dtype: str) -> None:
    found = recognise(header(*ENDS) | header(f"{BLOCK}.weight", dtype=dtype))
    assert found is not None
    assert found.tensor == f"{BLOCK}.weight"
    assert "integers or 4 bits" in str(found)


LORAS = [
    "base_model.model.single_transformer_blocks.3.proj_mlp.lora_A.weight",
    "transformer.transformer_blocks.0.attn.to_k.lora_B.default.weight",
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    "single_blocks.4.processor.qkv_lora.up.weight",
    "transformer_blocks.1.attn.processor.to_out_lora.up.weight",
    "diffusion_model.double_blocks.2.img_mlp.0.lora_up.weight",
    "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
    "transformer_blocks.1.attn.to_q.base_layer.weight",
    "double_blocks.0.img_mlp.0.diff_b",
]


@pytest.mark.parametrize("name", LORAS)
def test_lora_in_a_file_of_its_own_and_inside_a_transformer(name: str) -> None:
    alone = contents_of(header(name))
    assert (alone.parts, alone.foreign and alone.foreign.role) == (frozenset(), "adapter")
    assert "a LoRA" in str(alone)
    inside = header(*BFL, name)
    assert contents_of(inside).parts == {"transformer"}
    with pytest.raises(CheckpointError, match="LoRA that was not merged") as caught:
        check_part(inside, "transformer", Path("flux1-dev.safetensors"))
    assert name in str(caught.value)
    assert "--lora" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("controlnet_blocks.0.weight", "a ControlNet"),
        ("controlnet_x_embedder.weight", "a ControlNet"),
        ("input_hint_block.0.weight", "a ControlNet"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "an IP-Adapter"),
        ("image_proj.norm.weight", "an IP-Adapter"),
        ("pulid_ca.0.norm1.weight", "PuLID"),
        ("redux_up.weight", "FLUX.1 Redux"),
        ("t5xxl", "a textual inversion"),
    ],
)
def test_adapters(name: str, words: str) -> None:
    # ControlNets have a transformer's first layers and blocks, and not its last.
    found = contents_of(header(*BFL[:1], BFL[2], name))
    assert found.parts == frozenset()
    assert words in str(found)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("model.diffusion_model.input_blocks.1.0.in_layers.0.weight", "Stable Diffusion ("),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", "Stable Diffusion ("),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "Stable Diffusion ("),
        ("conditioner.embedders.1.model.ln_final.weight", "Stable Diffusion XL"),
        ("add_embedding.linear_1.weight", "Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3 ("),
        ("pos_embed.pos_embed", "Stable Diffusion 3 or PixArt"),
        ("double_stream_modulation_img.lin.weight", "FLUX.2"),
        ("single_stream_modulation.linear.weight", "FLUX.2"),
        ("distilled_guidance_layer.in_proj.weight", "Chroma"),
        ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
        ("txt_norm.weight", "Qwen-Image"),
        ("blocks.0.cross_attn.k_img.weight", "Wan"),
        ("condition_embedder.time_embedder.linear_1.weight", "Wan"),
        ("double_blocks.0.img_attn_qkv.weight", "HunyuanVideo"),
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "HunyuanVideo"),
        ("double_stream_blocks.0.block.ff_i.w1.weight", "HiDream"),
        ("joint_transformer_blocks.0.attn.to_q.weight", "AuraFlow"),
        ("patchify_proj.weight", "LTX-Video"),
        ("adaln_single.linear.weight", "PixArt"),
        ("cap_embedder.1.weight", "Lumina"),
        ("model.layers.0.self_attn.q_proj.weight", "a language model"),
        ("clip_txt_mapper.weight", "Stable Cascade"),
    ],
)
def test_other_families(name: str, family: str) -> None:
    # Some have blocks of the same names as FLUX.1, and a VAE inside.
    found = contents_of(header(*BFL, "vae.decoder.conv_in.weight", name))
    assert found.parts == frozenset()
    assert f"a checkpoint of {family}" in str(found)


@pytest.mark.parametrize(
    "name",
    [
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "text_encoders.gemma2_2b.logit_scale",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.weight",
    ],
)
def test_text_encoders_inside_that_are_not_read(name: str) -> None:
    found = contents_of(header(*(f"model.diffusion_model.{n}" for n in BFL), name))
    assert found.parts == {"transformer"}
    assert "an all-in-one file with text encoders that are not FLUX.1's" in str(found)


def test_text_encoders_inside_count_however_little_is_there() -> None:
    """So that nothing under their prefixes is left out unseen."""
    name = "text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight"
    assert contents_of(header(*BFL, name)).parts == {"transformer", "t5"}


@pytest.mark.parametrize(
    "prefix",
    ["net.", "model.", "_orig_mod.", "module.module.", "unet.", "model_ema.", "state_dict.model."],
)
@pytest.mark.parametrize("names", [ENDS, BFL])
def test_prefixes(prefix: str, names: tuple[str, ...]) -> None:
    found = contents_of(header(*(prefix + name for name in names)))
    assert found.parts == frozenset()
    assert (found.foreign, found.prefix) == (None, prefix)
    with pytest.raises(CheckpointError, match=re.escape(f"prefix {prefix!r}")):
        check_part(header(*(prefix + name for name in names)), "transformer", Path("x"))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("t5", "transformer.encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("clip", "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"),
        ("vae", "first_stage_model.decoder.conv_in.weight"),
    ],
)
def test_prefixes_of_other_parts(part: str, name: str) -> None:
    with pytest.raises(CheckpointError, match="carry the prefix"):
        check_part(header(name), part, Path("model.safetensors"))


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_nothing_of_flux1_is_foreign(checkpoint: Callable[..., Path], layout: str) -> None:
    for file in checkpoint("dev", layout).rglob("*.safetensors"):
        tensors = read_header(file).tensors
        assert recognise(tensors) is None, file
        held = contents_of(tensors)
        assert (len(held.parts), held.prefix) == (1, None)


def test_millions_of_names_cost_little() -> None:
    names = {f"a{number}.b": Entry() for number in range(200_000)}
    assert recognise(names) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "by bitsandbytes"),
        ({"quant_method": "quanto"}, "by Quanto"),
        ({"quant_method": "torchao", "quant_type": "int8wo"}, "by torchao"),
        ({"quant_method": "gptq"}, "by gptq"),
        ({"quant_method": "svdquant"}, "SVDQuant"),
        ({"weights": "int4"}, "does not name"),
        (["x"], "does not name"),
    ],
)
def test_config_of_quantized_weights(settings: object, words: str) -> None:
    with pytest.raises(CheckpointError, match="quantization_config") as caught:
        check_config({"quantization_config": settings}, "transformer/config.json")
    assert words in str(caught.value)
    check_config({"quantization_config": None}, "transformer/config.json")
    read = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    check_config({"quantization_config": read}, "transformer/config.json")


@pytest.mark.parametrize(
    ("name", "start", "words"),
    [
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
        ("b.safetensors", b"<!doctype html><html>", "is a web page"),
        ("c.sft", b"<html><body>login</body></html>", "is a web page"),
        ("d.sft", b"PK\3\4" + bytes(30), "pickle"),
    ],
)
def test_files_that_begin_as_something_else(
    tmp_path: Path, name: str, start: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(start)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"ae.safetensors": ("decoder.conv_in.weight",)}, "ae.safetensors holds .* it is a VAE"),
        (
            {"clip_l.safetensors": ("text_model.encoder.layers.0.self_attn.k_proj.weight",)},
            "it is a text encoder",
        ),
        ({"wan.sft": ("head.modulation",), "a.sft": ("redux_up.weight",)}, "a.sft is FLUX.1 Redux"),
        ({"x.safetensors": ("lora_unet_x.alpha",)}, "it is a LoRA"),
    ],
)
def test_folders_without_a_transformer(
    tmp_path: Path, files: dict[str, tuple[str, ...]], words: str
) -> None:
    for name, tensors in files.items():
        write_sparse(tmp_path / name, [(tensor, "F16", (4, 4, 3, 3)) for tensor in tensors])
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)


def test_a_lora_beside_a_named_file_is_left_aside(bfl: Path) -> None:
    write_sparse(bfl / "style.safetensors", [(LORAS[0], "F32", (4, 4))])
    with pytest.raises(CheckpointError, match=r"style.safetensors, beside .* is a LoRA"):
        open_checkpoint(bfl)
    assert open_checkpoint(bfl / "flux1.safetensors").part("transformer").weights


def test_a_checkpoint_of_another_family_beside_is_left_aside(bfl: Path) -> None:
    names = ("conditioner.embedders.0.x.weight", "first_stage_model.decoder.conv_in.weight")
    write_sparse(bfl / "sdxl.safetensors", [(name, "F32", (4, 4, 3, 3)) for name in names])
    assert {file.name for file in open_checkpoint(bfl).files} >= {"ae.safetensors"}
    (bfl / "ae.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"sdxl.safetensors is a checkpoint of Stable"):
        open_checkpoint(bfl).part("vae")
