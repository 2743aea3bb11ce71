"""Names and row orders of the two checkpoint layouts, brought to those of the exported graphs.

The graphs use the names of the diffusers layout, except that each linear is its own: q, k, v and
MLP of a fused tensor, and shift and scale of the final AdaLN, are row ranges of one stored tensor.
"""

from __future__ import annotations

import re

from exporters.checkpoint.tensors import StoredTensor, Weights
from fluxdeploy.errors import CheckpointError

__all__ = ["canonical_transformer", "canonical_vae"]

_QKV = ("to_q", "to_k", "to_v")
_PARAMETERS = ("weight", "bias", "scale")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")

_BFL_TRANSFORMER = {
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

_BLOCK = r"(?:single_)?transformer_blocks\.\d+"
_DIFFUSERS_TRANSFORMER = re.compile(
    "|".join(
        [
            *(re.escape(name).replace(r"\\1", r"\d+") for name in _BFL_TRANSFORMER.values()),
            rf"{_BLOCK}\.attn\.(?:{'|'.join((*_QKV, *_ADDED_QKV))})",
            rf"{_BLOCK}\.proj_mlp",
            r"norm_out\.linear",
        ]
    )
)
"""The modules of an MM-DiT in diffusers layout: what the other layout is renamed to."""

_BFL_VAE = {
    r"(encoder|decoder)\.mid\.block_1\.(.+)": r"\1.mid_block.resnets.0.\2",
    r"(encoder|decoder)\.mid\.block_2\.(.+)": r"\1.mid_block.resnets.1.\2",
    r"(encoder|decoder)\.mid\.attn_1\.norm": r"\1.mid_block.attentions.0.group_norm",
    r"(encoder|decoder)\.mid\.attn_1\.([qkv])": r"\1.mid_block.attentions.0.to_\2",
    r"(encoder|decoder)\.mid\.attn_1\.proj_out": r"\1.mid_block.attentions.0.to_out.0",
    r"(encoder|decoder)\.norm_out": r"\1.conv_norm_out",
    r"encoder\.down\.(\d+)\.block\.(\d+)\.(.+)": r"encoder.down_blocks.\1.resnets.\2.\3",
    r"encoder\.down\.(\d+)\.downsample\.conv": r"encoder.down_blocks.\1.downsamplers.0.conv",
    r"decoder\.up\.(\d+)\.block\.(\d+)\.(.+)": r"decoder.up_blocks.\1.resnets.\2.\3",
    r"decoder\.up\.(\d+)\.upsample\.conv": r"decoder.up_blocks.\1.upsamplers.0.conv",
}


def _renamed(name: str, table: dict[str, str]) -> str | None:
    """The name of a module under the table's first rule that fits it whole."""
    for pattern, replacement in table.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def _split(tensor: StoredTensor, sizes: list[int]) -> list[StoredTensor]:
    if sum(sizes) != tensor.row_count:
        raise CheckpointError(
            f"Tensor {tensor.name} in {tensor.file} has {tensor.row_count} rows; the model's width "
            f"asks for {sum(sizes)}. The checkpoint is not a FLUX.1 model or is damaged."
        )
    parts, start = [], 0
    for size in sizes:
        parts.append(tensor.rows(start, start + size))
        start += size
    return parts


def canonical_transformer(tensors: Weights) -> dict[str, StoredTensor]:
    """The tensors of an MM-DiT of either layout under the names of the graphs.

    Raises `CheckpointError` for a tensor that FLUX.1 does not have and for fused tensors whose
    rows do not fit the model's width.
    """
    layout_is_bfl = "img_in.weight" in tensors
    embedder = tensors.get("img_in.weight" if layout_is_bfl else "x_embedder.weight")
    if embedder is None:
        raise CheckpointError(
            "The transformer has neither x_embedder.weight nor img_in.weight: "
            "it is not a FLUX.1 model."
        )
    width = embedder.row_count
    weights: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        if parameter not in _PARAMETERS:
            raise _foreign(tensor)
        if module == ("final_layer.adaLN_modulation.1" if layout_is_bfl else "norm_out.linear"):
            order = ("shift", "scale") if layout_is_bfl else ("scale", "shift")
            targets = [f"norm_out.{half}" for half in order]
            sizes = [width, width]
        elif not layout_is_bfl:
            if not _DIFFUSERS_TRANSFORMER.fullmatch(module) or parameter == "scale":
                raise _foreign(tensor)
            targets, sizes = [module], [tensor.row_count]
        elif match := re.fullmatch(r"double_blocks\.(\d+)\.(img|txt)_attn\.qkv", module):
            names = _QKV if match[2] == "img" else _ADDED_QKV
            targets = [f"transformer_blocks.{match[1]}.attn.{part}" for part in names]
            sizes = [width] * 3
        elif match := re.fullmatch(r"single_blocks\.(\d+)\.linear1", module):
            block = f"single_transformer_blocks.{match[1]}"
            targets = [*(f"{block}.attn.{part}" for part in _QKV), f"{block}.proj_mlp"]
            sizes = [width] * 3 + [tensor.row_count - 3 * width]
        else:
            target = _renamed(module, _BFL_TRANSFORMER)
            if target is None:
                raise _foreign(tensor)
            targets, sizes = [target], [tensor.row_count]
        suffix = "weight" if parameter == "scale" else parameter
        for target, part in zip(targets, _split(tensor, sizes), strict=True):
            weights[f"{target}.{suffix}"] = part
    return weights


def _foreign(tensor: StoredTensor) -> CheckpointError:
    return CheckpointError(
        f"Tensor {tensor.name} in {tensor.file} does not belong to a FLUX.1 transformer; "
        "models of other families are not read."
    )


def canonical_vae(tensors: Weights) -> dict[str, StoredTensor]:
    """The tensors of a VAE of either layout under the names of the graphs."""
    if "decoder.up.0.block.0.conv1.weight" not in tensors:
        return dict(tensors)
    levels = 1 + max(
        int(match[1]) for name in tensors if (match := re.match(r"decoder\.up\.(\d{1,9})\.", name))
    )
    weights = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        target = _renamed(module, _BFL_VAE) or module
        target = target.replace("nin_shortcut", "conv_shortcut")
        if match := re.match(r"decoder\.up_blocks\.(\d{1,9})\.", target):
            # BFL counts the decoder's levels from the image, diffusers from the latents.
            level = levels - 1 - int(match[1])
            target = f"decoder.up_blocks.{level}.{target[match.end() :]}"
        is_linear = ".attentions.0.to_" in target and parameter == "weight"
        weights[f"{target}.{parameter}"] = tensor.squeezed() if is_linear else tensor
    return weights
