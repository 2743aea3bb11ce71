"""Full-size checkpoints of FLUX.1's kinds: real headers, no data on the disk.

FLUX.1-dev's is written in both layouts, the others' in that of diffusers.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

from exporters.checkpoint.controlnet_config import ControlNetConfig
from exporters.synthetic.sparse_checkpoint import (
    FLUX_DEV,
    declare_tensors,
    write_sparse_checkpoint,
    write_sparse_controlnet,
)
from fluxdeploy.bundle.tensorfile import write_sparse

__all__ = ["MODELS", "write_full_size"]

_DEV = FLUX_DEV.transformer
_UNION = ControlNetConfig(
    in_channels=64,
    control_channels=64,
    width=_DEV.width,
    head_dim=_DEV.head_dim,
    mlp_width=_DEV.mlp_width,
    double_blocks=5,
    single_blocks=10,
    text_width=_DEV.text_width,
    pooled_width=_DEV.pooled_width,
    guidance_embedding=True,
    axes_dims=_DEV.axes_dims,
    modes=10,
)
MODELS = {
    "dev": ("FluxPipeline", FLUX_DEV),
    "fill": ("FluxFillPipeline", replace(FLUX_DEV, transformer=replace(_DEV, in_channels=384))),
    "kontext": ("FluxKontextPipeline", FLUX_DEV),
    # InstantX's first Union, beside dev.
    "controlnet": ("FluxPipeline", replace(FLUX_DEV, controlnets=(_UNION,))),
}
"""Pipeline and sizes of each kind."""

Declaration = tuple[str, str, tuple[int, ...]]

_SHARDED = {
    # folder, file and bytes a shard, as the published checkpoint is cut: 3 files and 2.
    "transformer": ("transformer", "diffusion_pytorch_model", 10_000_000_000),
    "t5": ("text_encoder_2", "model", 5_000_000_000),
}

# Module of a block in diffusers' layout, and in Black Forest Labs'. Several with one target are
# row ranges of one tensor, in this order.
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_VAE = (
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
)


def write_full_size(folder: Path, layout: str, model: str = "dev") -> None:
    """Write a checkpoint of a kind to `folder`, in the layout "diffusers" or, of dev, "bfl".

    A ControlNet stands in the folder controlnet/ of it.
    """
    pipeline, sizes = MODELS[model]
    write_sparse_checkpoint(folder, sizes)
    if layout == "diffusers":
        for part, (name, stem, limit) in _SHARDED.items():
            (folder / name / f"{stem}.safetensors").unlink()
            _write_shards(folder / name, stem, declare_tensors(sizes, part), limit)
        index = folder / "model_index.json"
        said = json.loads(index.read_text(encoding="utf-8"))
        index.write_text(json.dumps({**said, "_class_name": pipeline}), encoding="utf-8")
        if sizes.controlnets:
            write_sparse_controlnet(folder / "controlnet", sizes)
        return
    for name in ("transformer", "vae", "scheduler"):
        shutil.rmtree(folder / name)
    (folder / "model_index.json").unlink()
    transformer = folder / "flux1-dev.safetensors"
    write_sparse(transformer, _bfl_transformer(declare_tensors(FLUX_DEV, "transformer")))
    write_sparse(folder / "ae.safetensors", _bfl_vae(declare_tensors(FLUX_DEV, "vae")))


def _write_shards(folder: Path, stem: str, declared: list[Declaration], limit: int) -> None:
    """Cut a file into shards of at most `limit` bytes, with the index that names them."""
    shards: list[list[Declaration]] = [[]]
    room = limit
    for name, dtype, shape in declared:
        nbytes = 2 * math.prod(shape)
        if nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append((name, dtype, shape))
        room -= nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_sparse(folder / file, shard)
        weight_map |= {name: file for name, _, _ in shard}
    total = sum(2 * math.prod(shape) for _, _, shape in declared)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _bfl_transformer(declared: list[Declaration]) -> list[Declaration]:
    """The tensors of an MM-DiT, fused and named as Black Forest Labs store them."""
    fused: dict[str, Declaration] = {}
    for name, dtype, shape in declared:
        module, _, parameter = name.rpartition(".")
        block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module)
        if block is None:
            target = _OUTSIDE[module]
        elif block[1]:
            target = f"single_blocks.{block[2]}.{_SINGLE[block[3]]}"
        else:
            target = f"double_blocks.{block[2]}.{_DOUBLE[block[3]]}"
        target += ".scale" if target.endswith("_norm") else f".{parameter}"
        rows = fused[target][2][0] if target in fused else 0
        fused[target] = (target, dtype, (rows + shape[0], *shape[1:]))
    return list(fused.values())


def _bfl_vae(declared: list[Declaration]) -> list[Declaration]:
    """The tensors of a VAE; the linears of its attention are 1×1 convolutions there."""
    renamed = []
    for name, dtype, shape in declared:
        for old, new in _VAE:
            name = name.replace(old, new)
        if match := re.match(r"decoder\.up_blocks\.(\d+)\.", name):
            # Counted from the image, where diffusers counts from the latents.
            level = len(FLUX_DEV.vae.channels) - 1 - int(match[1])
            name = f"decoder.up.{level}.{name[match.end() :]}"
        if "mid.attn_1." in name and len(shape) == 2:
            shape = (*shape, 1, 1)
        renamed.append((name, dtype, shape))
    return renamed
