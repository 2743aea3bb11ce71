"""What FLUX.1 Redux has after its encoder of pictures."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ReduxProjection"]


class ReduxProjection(nn.Module):
    """Features of a picture's patches [B,P,W] to text embeddings [B,P,E], float32."""

    def __init__(self, width: int, hidden_width: int, text_width: int) -> None:
        super().__init__()
        self.redux_up = nn.Linear(width, hidden_width)
        self.redux_down = nn.Linear(hidden_width, text_width)

    def forward(self, features: Tensor) -> Tensor:
        embeddings: Tensor = self.redux_down(F.silu(self.redux_up(features)))
        return embeddings.float()
