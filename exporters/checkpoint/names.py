"""Names and row orders of the two checkpoint layouts, brought to those of the exported graphs.

The graphs use the names of the diffusers layout, except that each linear is its own: q, k, v and
MLP of a fused tensor, and shift and scale of the final AdaLN, are row ranges of one stored tensor.
"""

from __future__ import annotations

import re

from exporters.checkpoint.tensors import StoredTensor, Weights
from fluxdeploy.bfl_names import ADDED_QKV, FINAL_ADALN, QKV, RENAMED, graph_names
from fluxdeploy.errors import CheckpointError

__all__ = ["canonical_controlnet", "canonical_transformer", "canonical_vae"]

_PARAMETERS = ("weight", "bias", "scale")

_BLOCK = r"(?:single_)?transformer_blocks\.\d+"
_DIFFUSERS_TRANSFORMER = re.compile(
    "|".join(
        [
            *(re.escape(name).replace(r"\\1", r"\d+") for name in RENAMED.values()),
            rf"{_BLOCK}\.attn\.(?:{'|'.join((*QKV, *ADDED_QKV))})",
            rf"{_BLOCK}\.proj_mlp",
            r"norm_out\.linear",
        ]
    )
)
"""The modules of an MM-DiT in diffusers layout: what the other layout is renamed to."""

_CONTROLNET = re.compile(
    r"controlnet_(?:single_)?blocks\.\d+|controlnet_x_embedder|controlnet_mode_embedder"
    r"|input_hint_block\.(?:conv_in|conv_out|blocks\.\d+)"
)
"""The modules of a ControlNet besides those of an MM-DiT."""

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


def _targets(module: str, parameter: str, layout_is_bfl: bool) -> tuple[str, ...] | None:
    """What a module is in the graphs, in the order of its rows; None for no module of FLUX.1."""
    if layout_is_bfl:
        return graph_names(module)
    if module == "norm_out.linear":
        return FINAL_ADALN
    known = _DIFFUSERS_TRANSFORMER.fullmatch(module) and parameter != "scale"
    return (module,) if known else None


def _split(tensor: StoredTensor, targets: tuple[str, ...], width: int) -> list[StoredTensor]:
    """The rows of each target: `width` each, but for an MLP's, which has those that are left."""
    if len(targets) == 1:
        return [tensor.rows(0, tensor.row_count)]
    sizes = [width] * len(targets)
    if targets[-1].endswith("proj_mlp"):
        sizes[-1] = tensor.row_count - sum(sizes[:-1])
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
        targets = _targets(module, parameter, layout_is_bfl)
        if targets is None:
            raise _foreign(tensor)
        suffix = "weight" if parameter == "scale" else parameter
        for target, part in zip(targets, _split(tensor, targets, width), strict=True):
            weights[f"{target}.{suffix}"] = part
    return weights


def canonical_controlnet(tensors: Weights) -> dict[str, StoredTensor]:
    """The tensors of a ControlNet in diffusers layout.

    Raises `CheckpointError` for a tensor that none of FLUX.1 has.
    """
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        known = _CONTROLNET.fullmatch(module) or (
            _DIFFUSERS_TRANSFORMER.fullmatch(module) and not module.startswith(("norm_out", "proj"))
        )
        if not known or parameter not in ("weight", "bias"):
            raise CheckpointError(
                f"Tensor {tensor.name} in {tensor.file} does not belong to a ControlNet of FLUX.1 "
                "in diffusers' layout, the one that is read: convert it, or take one that is."
            )
    return dict(tensors)


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
