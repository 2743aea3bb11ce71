"""The form of attention that every component exports, and one over a few keys."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention", "few_keys_attention"]


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


def few_keys_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ) V for a handful of keys, whose scores are small beside the queries.

    Shapes and types are those of `attention`. The softmax is written out, and the products are
    functions and no operators: nothing takes it for one of a network's large attentions, which are
    counted, fused and quantized.
    """
    scaled = (query.float() * scale).to(value.dtype)
    scores = torch.matmul(scaled, key.to(value.dtype).transpose(-1, -2)).float()
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.matmul(weights.to(value.dtype), value)
