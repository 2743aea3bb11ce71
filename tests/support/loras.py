"""LoRA files of random values, in PEFT's form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["MODULES", "add_lora", "write_lora"]

_WIDTH = 96

MODULES: Mapping[str, tuple[int, int]] = {
    "transformer_blocks.0.attn.to_q": (_WIDTH, _WIDTH),
    "single_transformer_blocks.1.proj_mlp": (4 * _WIDTH, _WIDTH),
    "norm_out.linear": (2 * _WIDTH, _WIDTH),
}
"""Of the random checkpoint `dev`, as diffusers names them: the shape [out, in] of each. They belong
to the conditioner and the transformer."""


def write_lora(path: Path, seed: int = 0, rank: int = 3) -> Path:
    """A LoRA of `MODULES`, strong enough to be seen in pictures."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, width) in MODULES.items():
        tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, width, generator=draw)
        up = 0.1 * torch.randn(out, rank, generator=draw)
        tensors[f"transformer.{module}.lora_B.weight"] = up
    save_file(tensors, path)
    return path


@torch.no_grad()
def add_lora(transformer: torch.nn.Module, path: Path, strength: float) -> None:
    """Merge a file of `write_lora` into diffusers' transformer, as `fuse_lora` does."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    for module in MODULES:
        up = tensors[f"transformer.{module}.lora_B.weight"]
        down = tensors[f"transformer.{module}.lora_A.weight"]
        transformer.get_submodule(module).weight += strength * up @ down  # type: ignore[operator]
