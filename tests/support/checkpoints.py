"""Random FLUX.1 checkpoints of odd shapes, made with diffusers and transformers themselves.

At their default initialisation such networks hide mistakes: text and timestep hardly move the
picture, and swapped RoPE axes move a pixel by 5/255. `amplify` scales the weights that carry each
input, until each of them moves the picture by a good part of its range.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from exporters.synthetic.small_tokenizers import Form, write_tokenizers


@dataclass(frozen=True)
class Shape:
    """Sizes of a random checkpoint."""

    name: str
    head_dim: int = 24
    heads: int = 4
    axes_dims: tuple[int, int, int] = (4, 8, 12)
    double: int = 2
    single: int = 2
    guidance: bool = True
    dynamic_shift: bool = True
    shift: float = 3.0
    text_width: int = 48
    pooled_width: int = 40
    vae_channels: tuple[int, ...] = (16, 16, 24, 32)
    vae_groups: int = 8
    tokenizers: Form = "json"
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    pipeline: str = "FluxPipeline"
    reads: int = 64


SHAPES = {
    shape.name: shape
    for shape in (
        # FLUX.1-dev's kind: guidance, a schedule shifted by the picture's size.
        Shape("dev"),
        # FLUX.1-schnell's kind: no guidance, an unshifted schedule, slow tokenizer files.
        Shape(
            "schnell",
            head_dim=20,
            heads=3,
            axes_dims=(8, 8, 4),
            double=1,
            single=3,
            guidance=False,
            dynamic_shift=False,
            shift=1.0,
            text_width=40,
            pooled_width=56,
            vae_channels=(8, 24, 16, 16),
            vae_groups=4,
            tokenizers="model",
            seed=4,
        ),
        # The others have the VAE of one of these, and the last its text encoders too, in other
        # weights: a test session traces each kind of network once.
        # Guidance and a constant shift; more double-stream blocks than single-stream ones.
        Shape(
            "constant",
            head_dim=32,
            heads=2,
            axes_dims=(4, 16, 12),
            double=3,
            single=1,
            dynamic_shift=False,
            shift=2.5,
            text_width=72,
            pooled_width=32,
            seed=2,
        ),
        # No guidance, yet a shifted schedule; one wide axis of RoPE.
        Shape(
            "wide",
            head_dim=28,
            heads=5,
            axes_dims=(2, 6, 20),
            double=2,
            single=1,
            guidance=False,
            text_width=40,
            pooled_width=56,
            vae_channels=(8, 24, 16, 16),
            vae_groups=4,
            tokenizers="model",
            seed=3,
        ),
        # FLUX.1's tools, of dev's blocks in other numbers.
        Shape("fill", double=1, single=3, pipeline="FluxFillPipeline", reads=384),
        Shape("control", double=3, single=1, pipeline="FluxControlPipeline", reads=128),
        Shape("kontext", axes_dims=(8, 6, 10), single=1, pipeline="FluxKontextPipeline"),
    )
}
"""The checkpoints of the parity tests, by name."""


def make_checkpoint(folder: Path, shape: Shape, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint in diffusers layout to `folder`, and return it."""
    torch.manual_seed(shape.seed)
    vocabulary = write_tokenizers(folder, form=shape.tokenizers)
    transformer = FluxTransformer2DModel(
        in_channels=shape.reads,
        out_channels=64,
        num_layers=shape.double,
        num_single_layers=shape.single,
        attention_head_dim=shape.head_dim,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.text_width,
        pooled_projection_dim=shape.pooled_width,
        guidance_embeds=shape.guidance,
        axes_dims_rope=shape.axes_dims,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(shape.vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(shape.vae_channels),
        block_out_channels=shape.vae_channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=shape.vae_groups,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary.clip_vocab_size,
            hidden_size=shape.pooled_width,
            intermediate_size=2 * shape.pooled_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=vocabulary.clip_bos_token_id,
            eos_token_id=2 if shape.guidance else vocabulary.clip_eos_token_id,
            pad_token_id=vocabulary.clip_eos_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary.t5_vocab_size,
            d_model=shape.text_width,
            d_kv=8,
            d_ff=2 * shape.text_width,
            num_layers=2,
            num_heads=5,
            feed_forward_proj="gated-gelu",
        )
    )
    amplify(transformer, vae, clip, t5)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=shape.shift,
        use_dynamic_shifting=shape.dynamic_shift,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    scheduler.save_pretrained(folder / "scheduler")
    for part, name in (
        (transformer, "transformer"),
        (vae, "vae"),
        (clip, "text_encoder"),
        (t5, "text_encoder_2"),
    ):
        part.to(dtype).save_pretrained(folder / name)
    index = {
        "_class_name": shape.pipeline,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if shape.settings:
        index["_fluxdeploy"] = shape.settings
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return folder


def make_controlnet(
    folder: Path,
    shape: Shape,
    double: int,
    single: int,
    modes: int | None = None,
    hint: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a ControlNet for a checkpoint's transformer to `folder`, and return it.

    It moves the picture: the projections that training begins with at zero are random here.
    """
    torch.manual_seed(100 + seed)
    network = FluxControlNetModel(
        patch_size=1 if hint is None else 2,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=shape.head_dim,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.text_width,
        pooled_projection_dim=shape.pooled_width,
        guidance_embeds=shape.guidance,
        axes_dims_rope=shape.axes_dims,
        num_mode=modes,
        conditioning_embedding_channels=hint,
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(("controlnet_", "input_hint_block.conv_out")):
                fan = parameter[0].numel() if parameter.ndim > 1 else 10
                parameter.normal_(0, fan**-0.5)
            for pattern, factor in _FACTORS["transformer"].items():
                if fnmatchcase(name, pattern):
                    parameter.mul_(factor)
    network.save_pretrained(folder)
    return folder


def make_ip_adapter(folder: Path, shape: Shape, tokens: int = 4, seed: int = 0) -> Path:
    """Write XLabs' kind of IP-Adapter for a checkpoint's transformer to `folder`, and return it.

    Its image encoder lies beside it. What it adds moves the picture by a good part of its range.
    """
    torch.manual_seed(200 + seed)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=36,
            intermediate_size=52,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=31,
            patch_size=7,
            projection_dim=28,
        )
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    encoder.save_pretrained(folder / "image_encoder")
    width, text = shape.head_dim * shape.heads, shape.text_width
    tensors = {
        "ip_adapter_proj_model.proj.weight": torch.randn(tokens * text, 28),
        "ip_adapter_proj_model.proj.bias": torch.randn(tokens * text),
        "ip_adapter_proj_model.norm.weight": 1 + 0.3 * torch.randn(text),
        "ip_adapter_proj_model.norm.bias": 0.3 * torch.randn(text),
    }
    for block in range(shape.double):
        for kind, factor in (("k", 6.0), ("v", 3.0)):
            name = f"double_blocks.{block}.processor.ip_adapter_double_stream_{kind}_proj"
            tensors[f"{name}.weight"] = factor * text**-0.5 * torch.randn(width, text)
            tensors[f"{name}.bias"] = 0.3 * torch.randn(width)
    save_file(tensors, folder / "ip_adapter.safetensors")
    return folder


@torch.no_grad()
def make_redux(folder: Path, shape: Shape, seed: int = 0, **changes: Any) -> Path:
    """Write a Redux for a checkpoint's transformer to `folder`, and return it.

    A picture becomes 16 tokens that are as large as T5's. Heads do not fill a power of two, and
    pictures are no whole number of patches.
    """
    torch.manual_seed(200 + seed)
    sizes = {
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 31,
        "patch_size": 7,
        **changes,
    }
    encoder = SiglipVisionModel(SiglipVisionConfig(**sizes))
    embedder = ReduxImageEncoder(sizes["hidden_size"], shape.text_width)
    for name, parameter in (*encoder.named_parameters(), *embedder.named_parameters()):
        spread = 1.0 if parameter.ndim == 1 else parameter[0].numel() ** 0.5
        factor = 3.0 if name.endswith("patch_embedding.weight") else 1.0
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        size = 0.3 if parameter.ndim == 1 else factor
        parameter.copy_(offset + size * torch.randn_like(parameter) / spread)
    encoder.save_pretrained(folder / "image_encoder")
    embedder.save_pretrained(folder / "image_embedder")
    side = sizes["image_size"]
    SiglipImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder / "feature_extractor")
    index = {"_class_name": "FluxPriorReduxPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


# Factors for the weights of default-initialised networks, by patterns of their names: as large as
# it takes for each input and formula to show in the picture, as small as float32 rounding allows.
_FACTORS: dict[str, dict[str, float]] = {
    "transformer": {
        "*.norm_[qk].weight": 3.0,
        "*.norm_added_[qk].weight": 3.0,
        "x_embedder.weight": 3.0,
        "context_embedder.weight": 3.0,
        "time_text_embed.*.weight": 3.0,
        "*norm*.linear.weight": 1.2,
        "*.to_v.weight": 3.0,
        "*.add_v_proj.weight": 3.0,
        "*.to_out.0.weight": 3.0,
        "*.to_add_out.weight": 3.0,
        "*.net.2.weight": 6.0,
        "*.proj_out.weight": 6.0,
        "proj_out.weight": 1.5,
    },
    "vae": {
        "decoder.conv_in.weight": 0.5,
        "decoder.*.conv2.weight": 6.0,
        "decoder.*.to_[qk].weight": 3.0,
        "decoder.*.to_out.0.weight": 8.0,
    },
    "clip": {"*embedding.weight": 20.0},
    "t5": {"*.SelfAttention.[qk].weight": 1.5},
}


@torch.no_grad()
def amplify(transformer: Any, vae: Any, clip: Any, t5: Any) -> None:
    """Scale weights until every input of the networks matters; biases become random too."""
    networks = {"transformer": transformer, "vae": vae, "clip": clip, "t5": t5}
    for part, network in networks.items():
        for name, parameter in network.named_parameters():
            if name.endswith("bias") and parameter.ndim == 1:
                parameter.normal_(0, 0.3)
            elif parameter.ndim == 1:  # norm weights
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            for pattern, factor in _FACTORS[part].items():
                if fnmatchcase(name, pattern):
                    parameter.mul_(factor)
    for name, parameter in t5.named_parameters():
        if name.endswith("relative_attention_bias.weight"):
            parameter.normal_(0, 1.0)
    # Most pixels must be off the ends of the range, where clipping hides errors.
    latents = 1.5 * torch.randn(4, 16, 8, 8) / 0.3611 + 0.1159
    output = vae.decoder.conv_out
    output.weight.mul_(0.55 / vae.decode(latents).sample.std())
    output.bias.sub_(vae.decode(latents).sample.mean((0, 2, 3)))


def load_diffusers(folder: Path, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """The checkpoint as diffusers runs it, on the CPU and silent, its weights in `dtype`."""
    pipe = FluxPipeline.from_pretrained(folder).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def to_bfl_layout(source: Path, target: Path, prefix: str = "") -> Path:
    """Rewrite a checkpoint of `make_checkpoint` in Black Forest Labs' layout."""
    target.mkdir(parents=True)
    config = json.loads((source / "transformer" / "config.json").read_text())
    tensors = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    fused = {
        prefix + name: tensor.contiguous() for name, tensor in _bfl_transformer(tensors, config)
    }
    save_file(fused, target / "flux1.safetensors")
    (target / "config.json").write_text(json.dumps({"axes_dims_rope": config["axes_dims_rope"]}))
    vae_config = json.loads((source / "vae" / "config.json").read_text())
    vae = load_file(source / "vae" / "diffusion_pytorch_model.safetensors")
    levels = len(vae_config["block_out_channels"])
    save_file(dict(_bfl_vae(vae, levels)), target / "ae.safetensors")
    (target / "vae").mkdir()
    shutil.copy(source / "vae" / "config.json", target / "vae")
    for folder in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(source / folder, target / folder)
    return target


def _bfl_transformer(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Any:
    def take(*names: str) -> torch.Tensor:
        return torch.cat([tensors[name] for name in names])

    embedders = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }
    if config["guidance_embeds"]:
        embedders["guidance_in.in_layer"] = "time_text_embed.guidance_embedder.linear_1"
        embedders["guidance_in.out_layer"] = "time_text_embed.guidance_embedder.linear_2"
    for bfl, name in embedders.items():
        for p in ("weight", "bias"):
            yield f"{bfl}.{p}", tensors[f"{name}.{p}"]
    for p in ("weight", "bias"):
        scale, shift = tensors[f"norm_out.linear.{p}"].chunk(2)
        yield f"final_layer.adaLN_modulation.1.{p}", torch.cat([shift, scale])
    for i in range(config["num_layers"]):
        block, bfl = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for p in ("weight", "bias"):
            yield (
                f"{bfl}.img_attn.qkv.{p}",
                take(*(f"{block}.attn.{n}.{p}" for n in ("to_q", "to_k", "to_v"))),
            )
            yield (
                f"{bfl}.txt_attn.qkv.{p}",
                take(*(f"{block}.attn.add_{n}_proj.{p}" for n in "qkv")),
            )
            for part, name in (
                ("img_mod.lin", "norm1.linear"),
                ("txt_mod.lin", "norm1_context.linear"),
                ("img_attn.proj", "attn.to_out.0"),
                ("txt_attn.proj", "attn.to_add_out"),
                ("img_mlp.0", "ff.net.0.proj"),
                ("img_mlp.2", "ff.net.2"),
                ("txt_mlp.0", "ff_context.net.0.proj"),
                ("txt_mlp.2", "ff_context.net.2"),
            ):
                yield f"{bfl}.{part}.{p}", tensors[f"{block}.{name}.{p}"]
        for part, name in (
            ("img_attn.norm.query_norm", "norm_q"),
            ("img_attn.norm.key_norm", "norm_k"),
            ("txt_attn.norm.query_norm", "norm_added_q"),
            ("txt_attn.norm.key_norm", "norm_added_k"),
        ):
            yield f"{bfl}.{part}.scale", tensors[f"{block}.attn.{name}.weight"]
    for i in range(config["num_single_layers"]):
        block, bfl = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for p in ("weight", "bias"):
            names = [f"{block}.attn.to_{n}.{p}" for n in "qkv"] + [f"{block}.proj_mlp.{p}"]
            yield f"{bfl}.linear1.{p}", take(*names)
            yield f"{bfl}.linear2.{p}", tensors[f"{block}.proj_out.{p}"]
            yield f"{bfl}.modulation.lin.{p}", tensors[f"{block}.norm.linear.{p}"]
        yield f"{bfl}.norm.query_norm.scale", tensors[f"{block}.attn.norm_q.weight"]
        yield f"{bfl}.norm.key_norm.scale", tensors[f"{block}.attn.norm_k.weight"]


def _bfl_vae(tensors: dict[str, torch.Tensor], levels: int) -> Any:
    for name, tensor in tensors.items():
        half, _, rest = name.partition(".")
        for old, new in (
            ("mid_block.resnets.0.", "mid.block_1."),
            ("mid_block.resnets.1.", "mid.block_2."),
            ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
            ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
            ("mid_block.attentions.0.to_", "mid.attn_1."),
            ("conv_norm_out.", "norm_out."),
            ("conv_shortcut.", "nin_shortcut."),
            (".resnets.", ".block."),
            (".downsamplers.0.", ".downsample."),
            (".upsamplers.0.", ".upsample."),
            ("down_blocks.", "down."),
        ):
            rest = rest.replace(old, new)
        if rest.startswith("up_blocks."):
            _, level, tail = rest.split(".", 2)
            rest = f"up.{levels - 1 - int(level)}.{tail}"
        if "mid.attn_1." in rest and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        yield f"{half}.{rest}", tensor.contiguous()
