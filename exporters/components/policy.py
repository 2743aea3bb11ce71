"""Which linears are quantized: the large ones, whose inputs are many rows of tokens.

Left alone everywhere: the image and text projections, the MLPs of timestep, guidance and pooled
text, and the final AdaLN with its projection. They are small, and pictures are sensitive to them.
The AdaLN linears are products with one vector, so that only their weights are worth quantizing.
"""

from __future__ import annotations

import re

__all__ = ["is_quantized"]

_LINEARS = {
    "transformer": (
        r"transformer_blocks\.\d+\."
        r"(attn\.(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_out\.0|to_add_out)"
        r"|(ff|ff_context)\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
    ),
    "conditioner": (
        r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear"
        r"|single_transformer_blocks\.\d+\.norm\.linear"
    ),
    "t5": (
        r"encoder\.block\.\d+\.layer\."
        r"(0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.(wi_0|wi_1|wo))"
    ),
}
_PATTERNS = {component: re.compile(pattern) for component, pattern in _LINEARS.items()}


def is_quantized(component: str, linear: str) -> bool:
    """Whether a linear, such as `transformer_blocks.0.attn.to_q`, is one of the large ones."""
    pattern = _PATTERNS.get(component)
    return pattern is not None and pattern.fullmatch(linear) is not None
