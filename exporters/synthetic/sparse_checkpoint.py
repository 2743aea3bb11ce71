"""Checkpoints of any size without training: zeros that take no room on the disk, or random weights.

Names and shapes come from the exported networks themselves, so a checkpoint written here has
exactly the tensors that FLUX.1's have, in diffusers layout.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import CLIPTextConfig, T5Config

from exporters.checkpoint.checkpoint import controlnet_name
from exporters.checkpoint.config import TransformerConfig, VaeConfig
from exporters.checkpoint.controlnet_config import ControlNetConfig
from exporters.checkpoint.image_encoder_config import ImageEncoderConfig
from exporters.checkpoint.ip_adapter_config import IpAdapterConfig
from exporters.checkpoint.redux_config import ReduxConfig
from exporters.components.chain import Chain
from exporters.components.pieces import COMPUTE_TYPES
from exporters.components.registry import components_of
from exporters.synthetic.small_tokenizers import write_tokenizers
from fluxdeploy.bundle.files import write_atomic
from fluxdeploy.bundle.tensorfile import TensorEntry, from_float32, read_header, write_sparse

__all__ = [
    "FLUX_DEV",
    "MODEL_INDEX",
    "Sizes",
    "declare_tensors",
    "flux_of_depth",
    "write_random_checkpoint",
    "write_sparse_checkpoint",
    "write_sparse_controlnet",
]

Declaration = tuple[str, str, tuple[int, ...]]


MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""What model_index.json says of a FLUX.1 checkpoint in diffusers layout."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a checkpoint's four networks, and of what joins it."""

    transformer: TransformerConfig
    vae: VaeConfig
    clip: CLIPTextConfig
    t5: T5Config
    controlnets: tuple[ControlNetConfig, ...] = ()
    ip_adapter: IpAdapterConfig | None = None
    ip_adapter_encoder: ImageEncoderConfig | None = None
    redux: ReduxConfig | None = None


FLUX_DEV = Sizes(
    TransformerConfig(
        in_channels=64,
        out_channels=64,
        width=3072,
        head_dim=128,
        mlp_width=12288,
        double_blocks=19,
        single_blocks=38,
        text_width=4096,
        pooled_width=768,
        guidance_embedding=True,
        axes_dims=(16, 56, 56),
    ),
    VaeConfig(
        latent_channels=16,
        channels=(128, 256, 512, 512),
        layers=2,
        groups=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ),
    CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        eos_token_id=2,
    ),
    T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    ),
)
"""The sizes of FLUX.1-dev."""

_PARTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "clip": "text_encoder/model.safetensors",
    "t5": "text_encoder_2/model.safetensors",
}


def flux_of_depth(double_blocks: int, single_blocks: int) -> Sizes:
    """FLUX.1-dev's width and heads with fewer blocks, and the smallest networks around them."""
    return Sizes(
        replace(FLUX_DEV.transformer, double_blocks=double_blocks, single_blocks=single_blocks),
        VaeConfig(
            latent_channels=16,
            channels=(8, 8, 8, 8),
            layers=1,
            groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        CLIPTextConfig(
            vocab_size=1000,
            hidden_size=768,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=12,
            eos_token_id=2,
        ),
        T5Config(
            vocab_size=1000,
            d_model=4096,
            d_kv=64,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        ),
    )


def write_random_checkpoint(folder: Path, sizes: Sizes) -> None:
    """Write a checkpoint whose weights are as large as a trained one's, always the same ones.

    Linears and convolutions keep the variance of what they take, norms are near 1. AdaLN's linears
    are a tenth of that: a trained model's gates are small, and large ones amplify every rounding.
    """
    write_sparse_checkpoint(folder, sizes)

    def write(path: Path, entry: TensorEntry) -> None:
        name = entry.name
        random = np.random.default_rng(zlib.crc32(name.encode()))
        values = random.standard_normal(entry.shape, dtype=np.float32)
        if len(entry.shape) > 1:
            values /= math.sqrt(math.prod(entry.shape[1:]))
            values *= 0.1 if ".norm" in name else 1.0
        else:
            values *= 0.02
            values += 1.0 if "norm" in name and name.endswith(".weight") else 0.0
        with path.open("r+b") as output:
            output.seek(entry.offset)
            output.write(from_float32(values, "BF16").tobytes())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        written = [
            pool.submit(write, folder / path, entry)
            for path in _PARTS.values()
            for entry in read_header(folder / path).tensors.values()
        ]
        for each in written:
            each.result()


def write_sparse_checkpoint(folder: Path, sizes: Sizes) -> None:
    """Write a checkpoint of zeros that takes no room on the disk, whatever its size."""
    write_tokenizers(folder)
    _write_configs(folder, sizes)
    for part, path in _PARTS.items():
        write_sparse(folder / path, declare_tensors(sizes, part))


def write_sparse_controlnet(folder: Path, sizes: Sizes) -> None:
    """Write the first of the ControlNets, one that takes latents, as zeros that take no room."""
    config = sizes.controlnets[0]
    document = {
        "_class_name": "FluxControlNetModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "num_layers": config.double_blocks,
        "num_single_layers": config.single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.width // config.head_dim,
        "joint_attention_dim": config.text_width,
        "pooled_projection_dim": config.pooled_width,
        "guidance_embeds": config.guidance_embedding,
        "axes_dims_rope": list(config.axes_dims),
        "num_mode": config.modes or None,
    }
    folder.mkdir(parents=True)
    write_atomic(folder / "config.json", json.dumps(document, indent=2) + "\n")
    tensors = declare_tensors(sizes, controlnet_name(0))
    write_sparse(folder / "diffusion_pytorch_model.safetensors", tensors)


def declare_tensors(sizes: Sizes, part: str) -> list[Declaration]:
    """Names, types and shapes of a network's tensors in diffusers layout, all bfloat16."""
    compute = COMPUTE_TYPES["bf16"]
    known = components_of(sizes).values()
    built = [c.chain(sizes, compute) for c in known if c.part == part and c.present(sizes)]
    shapes = dict(_parameters(built))
    for parameter in ("weight", "bias"):
        # One tensor in the file, two linears in the graph.
        half = shapes.pop(f"norm_out.scale.{parameter}", None)
        if shapes.pop(f"norm_out.shift.{parameter}", None) and half:
            shapes[f"norm_out.linear.{parameter}"] = (2 * half[0], *half[1:])
    return [(name, "BF16", shape) for name, shape in shapes.items()]


def _parameters(chains: Iterable[Chain]) -> Iterable[tuple[str, tuple[int, ...]]]:
    for chain in chains:
        for stage in chain.stages:
            for name, parameter in stage.piece.module.named_parameters():
                yield stage.scope + name, tuple(parameter.shape)


def _write_configs(folder: Path, sizes: Sizes) -> None:
    transformer, vae = sizes.transformer, sizes.vae
    levels = len(vae.channels)
    documents: dict[str, dict[str, Any]] = {
        "model_index.json": dict(MODEL_INDEX),
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": transformer.guidance_embedding,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
        "transformer/config.json": {
            "_class_name": "FluxTransformer2DModel",
            "in_channels": transformer.in_channels,
            "out_channels": transformer.out_channels,
            "num_layers": transformer.double_blocks,
            "num_single_layers": transformer.single_blocks,
            "attention_head_dim": transformer.head_dim,
            "num_attention_heads": transformer.width // transformer.head_dim,
            "joint_attention_dim": transformer.text_width,
            "pooled_projection_dim": transformer.pooled_width,
            "guidance_embeds": transformer.guidance_embedding,
            "axes_dims_rope": list(transformer.axes_dims),
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": list(vae.channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": vae.layers,
            "latent_channels": vae.latent_channels,
            "norm_num_groups": vae.groups,
            "scaling_factor": vae.scaling_factor,
            "shift_factor": vae.shift_factor,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "text_encoder/config.json": {
            **sizes.clip.to_diff_dict(),
            "architectures": ["CLIPTextModel"],
        },
        "text_encoder_2/config.json": {
            **sizes.t5.to_diff_dict(),
            "architectures": ["T5EncoderModel"],
        },
    }
    for path, document in documents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / path, json.dumps(document, indent=2) + "\n")
