"""The form of attention that every component exports, and one over a few keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

__all__ = ["FOR_TRANSFORMERS", "attention", "few_keys_attention"]

FOR_TRANSFORMERS = "fluxdeploy"
"""What the layers of transformers know it by."""


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


def _of_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float = 1.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`attention` under the signature that transformers' layers call."""
    bias = attention_mask if position_bias is None else position_bias
    return attention(query, key, value, scaling, bias).transpose(1, 2), None


AttentionInterface.register(FOR_TRANSFORMERS, _of_layer)
