"""A transformer that learns a task over the one that it starts from, and what it has learnt.

Low ranks beside the linears of the blocks, and new weights for the few linears at the ends: a file
of a tenth of the transformer's size, as black-forest-labs ships Canny and Depth over dev.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from exporters.training.lora import add_low_rank

__all__ = ["Difference", "widen"]

_RANK = 32
_WHOLE = ("x_embedder", "context_embedder", "norm_out.linear", "proj_out")


class Difference(nn.Module):
    """What is trained of a transformer, whose own weights stay."""

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        transformer.requires_grad_(False)
        added = add_low_rank(transformer, _RANK)
        # A module's name has no dots.
        ranks = {
            name.replace(".", "-"): nn.ParameterList([part.down, part.up])
            for name, part in added.items()
        }
        self.low_ranks = nn.ModuleDict(ranks)
        whole = {
            name.replace(".", "-"): transformer.get_submodule(name).requires_grad_(True)
            for name in _WHOLE
        }
        self.whole = nn.ModuleDict(whole)

    def write(self, file: Path) -> None:
        """Write it in bfloat16, as `fluxdeploy.demo.assemble` reads it."""
        tensors: dict[str, Tensor] = {}
        for key, ranks in self.low_ranks.items():
            for half, values in zip("AB", ranks.parameters(), strict=True):
                tensors[f"{key.replace('-', '.')}.lora_{half}.weight"] = values
        for key, linear in self.whole.items():
            for name, values in linear.named_parameters():
                tensors[f"{key.replace('-', '.')}.{name}"] = values
        narrow = {name: values.detach().bfloat16().cpu() for name, values in tensors.items()}
        save_file(narrow, file, {"format": "pt"})


def widen(transformer: FluxTransformer2DModel, channels: int) -> None:
    """Let a transformer take `channels` more behind its latents, which do nothing yet."""
    old = transformer.x_embedder
    new = nn.Linear(old.in_features + channels, old.out_features)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_features] = old.weight
        new.bias.copy_(old.bias)
    transformer.x_embedder = new.to(old.weight.device)
    transformer.register_to_config(in_channels=new.in_features, out_channels=old.in_features)
