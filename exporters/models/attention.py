"""The one form of attention that every component exports."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention"]


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale · Q Kᵀ + bias) V, for Q, K, V of shape [B, heads, tokens, head_dim].

    Products run in the type of `value`; scaling and softmax run in float32. The scale goes to Q
    before the product, which halves the work on the [tokens, tokens] scores and is the place where
    TensorRT looks for it when it fuses the pattern.
    """
    if scale != 1.0:
        query = query.float() * scale
    scores = (query.to(value.dtype) @ key.to(value.dtype).transpose(-1, -2)).float()
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value
