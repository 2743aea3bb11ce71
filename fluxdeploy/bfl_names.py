"""The linears and norms of an MM-DiT by their names in BFL's files, and by those of the graphs.

The graphs use the names of diffusers, except that each linear is its own: q, k, v and MLP of a
fused tensor, and shift and scale of the final AdaLN, are row ranges of one stored tensor.
"""

from __future__ import annotations

import re

__all__ = ["ADDED_QKV", "FINAL_ADALN", "QKV", "RENAMED", "graph_names"]

QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")

RENAMED = {
    r"double_blocks\.(\d+)\.img_mod\.lin": r"transformer_blocks.\1.norm1.linear",
    r"double_blocks\.(\d+)\.txt_mod\.lin": r"transformer_blocks.\1.norm1_context.linear",
    r"double_blocks\.(\d+)\.img_attn\.proj": r"transformer_blocks.\1.attn.to_out.0",
    r"double_blocks\.(\d+)\.txt_attn\.proj": r"transformer_blocks.\1.attn.to_add_out",
    r"double_blocks\.(\d+)\.img_mlp\.0": r"transformer_blocks.\1.ff.net.0.proj",
    r"double_blocks\.(\d+)\.img_mlp\.2": r"transformer_blocks.\1.ff.net.2",
    r"double_blocks\.(\d+)\.txt_mlp\.0": r"transformer_blocks.\1.ff_context.net.0.proj",
    r"double_blocks\.(\d+)\.txt_mlp\.2": r"transformer_blocks.\1.ff_context.net.2",
    r"double_blocks\.(\d+)\.img_attn\.norm\.query_norm": r"transformer_blocks.\1.attn.norm_q",
    r"double_blocks\.(\d+)\.img_attn\.norm\.key_norm": r"transformer_blocks.\1.attn.norm_k",
    r"double_blocks\.(\d+)\.txt_attn\.norm\.query_norm": r"transformer_blocks.\1.attn.norm_added_q",
    r"double_blocks\.(\d+)\.txt_attn\.norm\.key_norm": r"transformer_blocks.\1.attn.norm_added_k",
    r"single_blocks\.(\d+)\.modulation\.lin": r"single_transformer_blocks.\1.norm.linear",
    r"single_blocks\.(\d+)\.linear2": r"single_transformer_blocks.\1.proj_out",
    r"single_blocks\.(\d+)\.norm\.query_norm": r"single_transformer_blocks.\1.attn.norm_q",
    r"single_blocks\.(\d+)\.norm\.key_norm": r"single_transformer_blocks.\1.attn.norm_k",
    r"img_in": "x_embedder",
    r"txt_in": "context_embedder",
    r"time_in\.in_layer": "time_text_embed.timestep_embedder.linear_1",
    r"time_in\.out_layer": "time_text_embed.timestep_embedder.linear_2",
    r"guidance_in\.in_layer": "time_text_embed.guidance_embedder.linear_1",
    r"guidance_in\.out_layer": "time_text_embed.guidance_embedder.linear_2",
    r"vector_in\.in_layer": "time_text_embed.text_embedder.linear_1",
    r"vector_in\.out_layer": "time_text_embed.text_embedder.linear_2",
    r"final_layer\.linear": "proj_out",
}
"""Modules that are one in both, as patterns of BFL's names."""

FINAL_ADALN = ("norm_out.scale", "norm_out.shift")
"""The halves of diffusers' `norm_out.linear`, in its order; BFL's file has them the other way."""

_IMAGE = tuple(rf"transformer_blocks.\1.attn.{name}" for name in QKV)
_TEXT = tuple(rf"transformer_blocks.\1.attn.{name}" for name in ADDED_QKV)
_SINGLE = tuple(rf"single_transformer_blocks.\1.attn.{name}" for name in QKV)
_RULES = {
    **{pattern: (name,) for pattern, name in RENAMED.items()},
    r"double_blocks\.(\d+)\.img_attn\.qkv": _IMAGE,
    r"double_blocks\.(\d+)\.txt_attn\.qkv": _TEXT,
    r"single_blocks\.(\d+)\.linear1": (*_SINGLE, r"single_transformer_blocks.\1.proj_mlp"),
    r"final_layer\.adaLN_modulation\.1": FINAL_ADALN[::-1],
}
_DOTTED = {re.compile(pattern): names for pattern, names in _RULES.items()}
_FLAT = {re.compile(pattern.replace(r"\.", "_")): names for pattern, names in _RULES.items()}


def graph_names(module: str, flat: bool = False) -> tuple[str, ...] | None:
    """What a module of a BFL file is in the graphs, in the order of its rows; None for no module.

    flat: the name has underscores in place of its dots, as in files of kohya's scripts.
    """
    for pattern, names in (_FLAT if flat else _DOTTED).items():
        match = pattern.fullmatch(module)
        if match:
            return tuple(match.expand(name) for name in names)
    return None
