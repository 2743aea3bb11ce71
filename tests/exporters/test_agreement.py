"""A checkpoint that contradicts itself is refused, with both sides named: it never draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engines import choose_builder
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.checkpoint.config import TransformerConfig
from exporters.components.registry import COMPONENTS
from exporters.export import check_all_used, specify
from fluxdeploy.build.checkpoint import check_drawable, find_text_remarks
from fluxdeploy.build.resolve import BuildRequest, BuildSpec, resolve
from fluxdeploy.build.sizes import SizeRange
from fluxdeploy.errors import CheckpointError
from tests.exporters.conftest import TRANSFORMER, VAE, Tensors, edit_json, edit_tensors

CLIP, T5 = "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"


def drop_key(path: Path, key: str) -> None:
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))


def dropping(prefix: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


# The config against the tensors.


@pytest.mark.parametrize(
    ("key", "said", "found"),
    [
        ("num_layers", 3, "2"),
        ("num_layers", 1, "2"),
        ("num_single_layers", 0, "2"),
        ("num_single_layers", "2", "2"),
        ("attention_head_dim", 48, "24"),
        ("num_attention_heads", 2, "4"),
        ("joint_attention_dim", 4096, "48"),
        ("pooled_projection_dim", 768, "40"),
        ("in_channels", 128, "64"),
        ("out_channels", 128, "64"),
        ("patch_size", 2, "1"),
        ("guidance_embeds", False, "true"),
        ("guidance_embeds", 1, "true"),
    ],
)
def test_transformer_config_against_its_tensors(
    copy: Path, key: str, said: Any, found: str
) -> None:
    edit_json(copy / "transformer/config.json", **{key: said})
    words = rf"transformer's config.json says {key} {json.dumps(said)}, and its tensors say {found}"
    with pytest.raises(CheckpointError, match=words):
        _ = open_checkpoint(copy).transformer


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("transformer_blocks.1.", "says num_layers 2, and its tensors say 1"),
        ("transformer_blocks.", "says num_layers 2, and its tensors say 0"),
        ("single_transformer_blocks.1.", "says num_single_layers 2, and its tensors say 1"),
        ("single_transformer_blocks.", "says num_single_layers 2, and its tensors say 0"),
        ("time_text_embed.guidance_embedder.", "says guidance_embeds true, .* say false"),
    ],
)
def test_missing_trailing_tensors(copy: Path, prefix: str, words: str) -> None:
    edit_tensors(copy / TRANSFORMER, dropping(prefix))
    with pytest.raises(CheckpointError, match=words):
        _ = open_checkpoint(copy).transformer


@pytest.mark.parametrize("prefix", ["double_blocks.1.", "single_blocks.1.", "guidance_in."])
def test_missing_trailing_tensors_in_bfl_layout(bfl: Path, prefix: str) -> None:
    """The config.json beside such a file tells, where somebody put one there."""
    edit_json(bfl / "config.json", num_layers=2, num_single_layers=2, guidance_embeds=True)
    edit_tensors(bfl / "flux1.safetensors", dropping(prefix))
    with pytest.raises(CheckpointError, match="and its tensors say"):
        _ = open_checkpoint(bfl).transformer


def test_guidance_that_the_config_does_not_mention(copy: Path) -> None:
    """Diffusers would take it for schnell's kind, and draw without guidance."""
    drop_key(copy / "transformer/config.json", "guidance_embeds")
    with pytest.raises(CheckpointError, match='does not say "guidance_embeds": true'):
        _ = open_checkpoint(copy).transformer


@pytest.mark.parametrize(
    ("key", "said", "found"),
    [
        ("block_out_channels", [16, 16, 24], r"\[16, 16, 24, 32\]"),
        ("block_out_channels", [16, 16, 24, 64], r"\[16, 16, 24, 32\]"),
        ("block_out_channels", 16, r"\[16, 16, 24, 32\]"),
        ("layers_per_block", 2, "1"),
        ("latent_channels", 4, "16"),
        ("in_channels", 4, "3"),
        ("out_channels", 4, "3"),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4, "DownEncoderBlock2D"),
        ("up_block_types", ["UpDecoderBlock2D"] * 3, "UpDecoderBlock2D"),
        ("use_quant_conv", True, "false"),
        ("use_post_quant_conv", True, "false"),
        ("mid_block_add_attention", False, "true"),
    ],
)
def test_vae_config_against_its_tensors(copy: Path, key: str, said: Any, found: str) -> None:
    edit_json(copy / "vae/config.json", **{key: said})
    with pytest.raises(CheckpointError, match=f"VAE's config.json says {key} .*{found}"):
        _ = open_checkpoint(copy).vae


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"act_fn": "relu"}, "act_fn 'relu'; silu"),
        ({"act_fn": "mish"}, "act_fn 'mish'; silu"),
        ({"act_fn": 1}, "act_fn 1; silu"),
        ({"latents_mean": [0.1] * 16}, "sets latents_mean"),
        ({"latents_std": [0.1] * 16}, "sets latents_std"),
        ({"scaling_factor": 0}, "scaling_factor 0"),
        ({"scaling_factor": []}, r"scaling_factor .* is \[\]"),
        ({"scaling_factor": "0.3"}, "scaling_factor .* is '0.3'"),
        ({"shift_factor": None}, "no shift_factor"),
        ({"shift_factor": [0.1]}, r"shift_factor .* is \[0.1\]"),
        ({"norm_num_groups": 7.5}, "7.5 groups"),
        ({"_class_name": "AutoencoderTiny"}, "one of a 'AutoencoderTiny'; .*AutoencoderKL"),
        ({"_class_name": "AutoencoderKLFlux2"}, "AutoencoderKLFlux2"),
    ],
)
def test_vae_that_is_not_computed(copy: Path, changes: dict[str, Any], words: str) -> None:
    edit_json(copy / "vae/config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        _ = open_checkpoint(copy).vae


def test_defaults_of_diffusers_where_the_vae_config_is_silent(copy: Path, bfl: Path) -> None:
    path = copy / "vae/config.json"
    drop_key(path, "scaling_factor")
    assert open_checkpoint(copy).vae.scaling_factor == 0.18215
    drop_key(path, "norm_num_groups")
    with pytest.raises(CheckpointError, match="do not split into 32 groups"):
        _ = open_checkpoint(copy).vae
    drop_key(path, "shift_factor")
    with pytest.raises(CheckpointError, match=r"norm_num_groups|no shift_factor"):
        _ = open_checkpoint(copy).vae
    # Black Forest Labs' own files have no config: there FLUX.1's constants are meant.
    (bfl / "vae/config.json").write_text('{"norm_num_groups": 8, "shift_factor": 0.1}')
    assert open_checkpoint(bfl).vae.scaling_factor == 0.18215


@pytest.mark.parametrize("swish", ["silu", "swish"])
def test_activation_under_both_its_names(copy: Path, swish: str) -> None:
    edit_json(copy / "vae/config.json", act_fn=swish)
    assert open_checkpoint(copy).vae.groups == 8


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_part_without_config(copy: Path, part: str) -> None:
    (copy / part / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"{part} has no config.json"):
        open_checkpoint(copy)


# Classes that model_index.json and configs name.


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("scheduler", "FlowMatchHeunDiscreteScheduler"),
        ("scheduler", "DPMSolverMultistepScheduler"),
        ("text_encoder", "CLIPTextModelWithProjection"),
        ("text_encoder_2", "UMT5EncoderModel"),
        ("transformer", "SD3Transformer2DModel"),
        ("vae", "AutoencoderTiny"),
        ("vae", 5),
    ],
)
def test_class_of_the_index(copy: Path, name: str, kind: Any) -> None:
    edit_json(copy / "model_index.json", **{name: ["diffusers", kind]})
    with pytest.raises(CheckpointError, match=f"says that {name} is a {kind!r}"):
        open_checkpoint(copy)


@pytest.mark.parametrize("kind", ["QwenImageTransformer2DModel", "Flux2Transformer2DModel", 5])
def test_class_of_the_transformer(copy: Path, kind: Any) -> None:
    edit_json(copy / "transformer/config.json", _class_name=kind)
    with pytest.raises(CheckpointError, match=f"one of a {kind!r}; FLUX.1 has a FluxTransformer"):
        _ = open_checkpoint(copy).transformer


# What nobody follows is told.


@pytest.mark.parametrize(
    ("path", "key", "where"),
    [
        ("transformer/config.json", "use_swiglu", "The transformer's config.json"),
        ("vae/config.json", "temporal_compression", "The VAE's config.json"),
        ("text_encoder/config.json", "rope_theta", "The clip text encoder's config.json"),
        ("text_encoder_2/config.json", "soft_cap", "The t5 text encoder's config.json"),
        ("scheduler/scheduler_config.json", "prediction_type", "The scheduler's config"),
        ("model_index.json", "controlnet", "model_index.json"),
    ],
)
def test_unknown_keys_are_told(copy: Path, path: str, key: str, where: str) -> None:
    assert open_checkpoint(copy).notices == ()
    edit_json(copy / path, **{key: ["a", "b"]})
    assert open_checkpoint(copy).notices == (
        f"{where} sets {key}, which is not known here and not followed",
    )


def test_configs_as_they_are_published_are_known(copy: Path) -> None:
    """Of FLUX.1-dev's text encoders: keys that transformers itself no longer has."""
    edit_json(copy / "text_encoder/config.json", dropout=0.0, torch_dtype="bfloat16")
    more = {"output_past": True, "decoder_start_token_id": 0, "use_cache": True}
    edit_json(copy / "text_encoder_2/config.json", **more, tie_word_embeddings=False)
    edit_json(copy / "model_index.json", image_encoder=[None, None], feature_extractor=[None, None])
    assert open_checkpoint(copy).notices == ()


# Tensors that stand for one, and tensors that nobody takes.


def test_two_embeddings_of_t5(copy: Path) -> None:
    table = load_file(copy / T5)["shared.weight"]
    edit_tensors(copy / T5, lambda t: t.update({"encoder.embed_tokens.weight": table.clone()}))
    assert open_checkpoint(copy).t5.vocab_size == len(table)
    for other in (table + 1e-3, table[:-1], table.bfloat16()):
        change = {"encoder.embed_tokens.weight": other.clone()}
        edit_tensors(copy / T5, lambda tensors, change=change: tensors.update(change))
        with pytest.raises(CheckpointError, match="stand for one tensor and differ"):
            open_checkpoint(copy)


@pytest.mark.parametrize(
    "name",
    [
        "final_layer_norm.bias",
        "encoder.layers.0.mlp.fc1.weight",
        "embeddings.token_embedding.weight",
    ],
)
def test_clip_under_both_its_names(copy: Path, name: str) -> None:
    prefixed = f"text_model.{name}"
    tensors = load_file(copy / CLIP)
    full, bare = (prefixed, name) if prefixed in tensors else (name, prefixed)
    edit_tensors(copy / CLIP, lambda t: t.update({bare: t[full].clone()}))
    open_checkpoint(copy)
    edit_tensors(copy / CLIP, lambda t: t.update({bare: t[full] + 1}))
    with pytest.raises(CheckpointError, match="stand for one tensor and differ"):
        open_checkpoint(copy)


def check_whole(checkpoint: Checkpoint) -> None:
    specs = [specify(checkpoint, component, "fp32") for component in COMPONENTS.values()]
    check_all_used(checkpoint, specs, COMPONENTS)


@pytest.mark.parametrize(
    ("path", "name", "shape"),
    [
        (TRANSFORMER, "transformer_blocks.0.attn.norm_q.bias", (24,)),
        (TRANSFORMER, "single_transformer_blocks.1.attn.to_out.0.weight", (96, 96)),
        (VAE, "decoder.mid_block.attentions.1.to_q.weight", (32, 32)),
        (VAE, "decoder.up_blocks.4.resnets.0.conv1.weight", (8, 16, 3, 3)),
        (VAE, "encoder.down_blocks.0.attentions.0.to_q.weight", (16, 16)),
        (VAE, "bottleneck.weight", (4,)),
        (CLIP, "text_model.encoder.layers.0.layer_norm3.weight", (40,)),
        (T5, "encoder.block.0.layer.1.DenseReluDense.wi.weight", (8, 48)),
    ],
)
def test_tensor_that_nobody_takes(copy: Path, path: str, name: str, shape: tuple[int, ...]) -> None:
    edit_tensors(copy / path, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(CheckpointError, match=r"none that FLUX\.1's|does not belong"):
        check_whole(open_checkpoint(copy))


def test_the_other_half_of_a_text_encoder_is_no_harm(copy: Path) -> None:
    more = {"text_projection.weight": torch.zeros(4, 4), "vision_model.x": torch.zeros(4)}
    edit_tensors(copy / CLIP, lambda tensors: tensors.update(more))
    more = {"decoder.final_layer_norm.weight": torch.ones(4)}
    more["spiece_model"] = torch.zeros(9, dtype=torch.uint8)
    edit_tensors(copy / T5, lambda tensors: tensors.update(more))
    check_whole(open_checkpoint(copy))


def test_single_components_do_not_ask_for_the_rest(opened: Checkpoint) -> None:
    specs = [specify(opened, COMPONENTS["vae_decoder"], "fp32")]
    check_all_used(opened, specs, COMPONENTS)


# What a checkpoint records, against its networks and tokenizers.


@pytest.fixture(scope="module")
def tokenizers(source: Path) -> dict[str, Any]:
    from exporters.tokenizers import canonical_tokenizer

    folders = {"clip": "tokenizer", "t5": "tokenizer_2"}
    return {name: canonical_tokenizer(source / at, name) for name, at in folders.items()}


def settle(checkpoint: Path, **sizes: Any) -> BuildSpec:
    runtime, targets = choose_builder("onnxruntime", (), "fp32")
    request = BuildRequest(str(checkpoint), "fp32", sizes=SizeRange(**sizes))
    return resolve(request, open_checkpoint(checkpoint), runtime, targets)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"height": 8192}, "height in model_index.json is 8192; at most 4096"),
        ({"width": 16 * 10**12}, "width .* at most 4096"),
        ({"num_inference_steps": 1001}, "num_inference_steps .* at most 1000"),
        ({"max_sequence_length": 10**9}, "max_sequence_length .* at most 4096"),
        ({"guidance_scale": 1e300}, "guidance_scale .* at most 1000"),
    ],
)
def test_settings_that_nothing_draws_with(copy: Path, settings: dict[str, Any], words: str) -> None:
    edit_json(copy / "model_index.json", _fluxdeploy=settings)
    with pytest.raises(CheckpointError, match=words):
        settle(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"shift": 1e300, "use_dynamic_shifting": False},
        {"shift": 1e-300, "use_dynamic_shifting": False},
        {"max_shift": 1e6},
        {"max_shift": -1e6},
        {"max_shift": -3.0, "time_shift_type": "linear"},
        {"shift_terminal": 1.0},
        {"shift_terminal": -0.5},
    ],
)
def test_schedule_whose_levels_do_not_fall(
    copy: Path, tokenizers: dict[str, Any], changes: dict[str, Any]
) -> None:
    edit_json(copy / "scheduler/scheduler_config.json", **changes)
    with pytest.raises(CheckpointError, match="noise levels do not fall"):
        check_drawable(open_checkpoint(copy), tokenizers)


@pytest.mark.parametrize(
    ("name", "part", "path", "table"),
    [
        ("clip", "text_encoder", CLIP, "token_embedding.weight"),
        ("t5", "text_encoder_2", T5, "shared.weight"),
    ],
)
def test_tokenizer_with_more_ids_than_embeddings(
    copy: Path, tokenizers: dict[str, Any], name: str, part: str, path: str, table: str
) -> None:
    largest = tokenizers[name].largest_id

    def cut(tensors: Tensors) -> None:
        full = next(key for key in tensors if key.endswith(table))
        tensors[full] = tensors[full][:largest].clone()

    edit_tensors(copy / path, cut)
    edit_json(copy / part / "config.json", vocab_size=largest)
    with pytest.raises(CheckpointError, match=f"ids up to {largest}, .* embeds {largest}"):
        check_drawable(open_checkpoint(copy), tokenizers)


def test_tokenizer_with_another_length_than_positions(copy: Path) -> None:
    edit_json(copy / "tokenizer/tokenizer_config.json", model_max_length=64)
    with pytest.raises(CheckpointError, match=r"pads to 64 tokens, .* has 77 positions"):
        settle(copy)


@pytest.mark.parametrize(("end", "told"), [(2, False), (None, False), (7, True)])
def test_end_of_text_that_no_prompt_has(
    copy: Path, tokenizers: dict[str, Any], end: int | None, told: bool
) -> None:
    if end is not None:
        edit_json(copy / "text_encoder/config.json", eos_token_id=end)
    remarks = find_text_remarks(open_checkpoint(copy), tokenizers)
    assert any(f"eos_token_id {end}" in remark for remark in remarks) is told


@pytest.mark.parametrize("target", ["sm89", "sm120"])
def test_defaults_are_in_the_size_that_engines_are_built_for(copy: Path, target: str) -> None:
    runtime, targets = choose_builder("tensorrt-rtx", (target,), "bf16")
    sizes = SizeRange(None, (256, 512), (512, 512))
    request = BuildRequest(str(copy), "bf16", sizes=sizes)
    defaults = resolve(request, open_checkpoint(copy), runtime, targets).defaults
    assert (defaults.height, defaults.width, defaults.num_inference_steps) == (256, 512, 28)


@pytest.mark.parametrize(
    ("width", "double", "single", "config", "told"),
    [
        (3072, 19, 38, {}, False),
        (3072, 18, 38, {}, True),
        (3072, 19, 37, {}, True),
        (3072, 8, 38, {}, True),
        (3072, 8, 38, {"num_layers": 8}, False),
        (96, 2, 2, {}, False),
    ],
)
def test_blocks_that_may_be_missing_are_told(
    width: int, double: int, single: int, config: dict[str, Any], told: bool
) -> None:
    """A file of FLUX.1's width without a config: pruned, or cut off."""
    axes = (16, 56, 56)
    sizes = TransformerConfig(
        64, 64, width, 128, 4 * width, double, single, 4096, 768, True, axes_dims=axes
    )
    assert any("pruned" in notice for notice in sizes.notices(config)) is told
