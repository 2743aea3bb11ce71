"""What an IP-Adapter has: a projection of a picture's embedding, and keys and values for blocks.

An IP-Adapter (Ye et al., 2023, arXiv 2308.06721) lets each block attend to a few tokens of a
picture, beside its text. All that depends on the picture alone is computed once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["KeysAndValues", "PictureTokens", "StackSeen"]


class PictureTokens(nn.Module):
    """A picture's embedding [B,E] as tokens [B,P,W], normalised, in the type of the weights."""

    def __init__(self, embedding: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(embedding, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, image_embeds: Tensor) -> Tensor:
        dtype = self.proj.weight.dtype
        x = self.proj(image_embeds.to(dtype)).unflatten(-1, (self.tokens, -1)).float()
        norm = self.norm
        x = F.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
        return x.to(dtype)


class KeysAndValues(nn.Module):
    """Tokens [B,P,W] as the keys and values of a block, [B,P,D] each, float32."""

    def __init__(self, token_width: int, width: int) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = (nn.Linear(token_width, width) for _ in range(2))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k_ip(tokens).float(), self.to_v_ip(tokens).float()


class StackSeen(nn.Module):
    """Keys or values of all blocks, in order, as one tensor [n,B,P,D]."""

    def forward(self, *blocks: Tensor) -> Tensor:
        return torch.stack(blocks)
