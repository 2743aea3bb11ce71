"""diffusers' transformer as a peer of `gpu_kernels_worker.py`, eager and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

__all__ = ["PREPARE", "flux"]


def flux(
    double_blocks: int, single_blocks: int, image: int, text: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A transformer of FLUX.1-dev's width with random weights, and inputs of a square picture.

    `image` and `text` are tokens. All is bfloat16 and on the GPU.
    """
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = FluxTransformer2DModel(
            num_layers=double_blocks, num_single_layers=single_blocks, guidance_embeds=True
        )
        side = torch.arange(math.isqrt(image))
        rows, columns = torch.meshgrid(side, side, indexing="ij")
        config = model.config
        inputs = {
            "hidden_states": torch.randn(1, image, config.in_channels),
            "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim),
            "timestep": torch.full((1,), 0.5),
            "guidance": torch.full((1,), 3.5),
            "img_ids": torch.stack((0 * rows, rows, columns), -1).reshape(-1, 3).bfloat16(),
            "txt_ids": torch.zeros(text, 3),
        }
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False).eval(), inputs


class RowwiseLinear(nn.Module):
    """A linear in FP8 with a scale for each row of its input and for each channel out.

    What torchao's `Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())` computes, in
    plain operations: through its tensors PyTorch 2.11 compiles a block for minutes.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, scale = _rows_in_8_bits(linear.weight)
        self.scale = scale.reshape(1, -1)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] to [.., N], in bfloat16."""
        rows, scale = _rows_in_8_bits(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(
            rows, self.weight.t(), scale, self.scale, self.bias, out_dtype=x.dtype,
            use_fast_accum=True,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], -1)


def _rows_in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 numbers [N,K], and float32 scales [N,1]."""
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    return (wide / scale).to(torch.float8_e4m3fn), scale


def _quantize(compile_it: Callable[[Any], Any], model: nn.Module) -> None:
    """The blocks' linears in FP8; AdaLN's have one row and stay."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "blocks." in name and "norm" not in name:
            model.set_submodule(name, RowwiseLinear(module))
    compile_it(model)


PREPARE: Mapping[str, Callable[[nn.Module], Any]] = {
    "eager": lambda model: None,
    "compile": lambda model: model.compile(),
    "compile-blocks": lambda model: model.compile_repeated_blocks(),
    "compile-fp8": partial(_quantize, lambda model: model.compile()),
    "compile-blocks-fp8": partial(_quantize, lambda model: model.compile_repeated_blocks()),
}
"""What makes each peer of the eager model.

With `blocks` the two kinds of blocks are compiled and not the whole, which takes a fraction of the
time and is what diffusers recommends; what is between the blocks is eager.
"""
