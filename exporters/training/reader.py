"""What lies where, read from a token's features."""

from __future__ import annotations

from torch import Tensor, nn

from fluxdeploy.demo.scenes import COLOURS, SHAPES

__all__ = ["Reader"]

_KINDS = [1 + len(SHAPES), 1 + len(COLOURS), 4]


class Reader(nn.Module):
    """A linear map from features to the labels of `data.labels`, only used in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(_KINDS))

    def loss(self, features: Tensor, marks: Tensor) -> Tensor:
        """Cross-entropy of the labels uint8 [B, L, 6] given features [B, L, width]."""
        shape, colour, covered = self.linear(features).float().split(_KINDS, dim=-1)
        entropy = nn.functional.cross_entropy
        return (
            entropy(shape.flatten(0, 1), marks[..., 0].long().flatten())
            + entropy(colour.flatten(0, 1), marks[..., 1].long().flatten())
            + nn.functional.binary_cross_entropy_with_logits(covered, marks[..., 2:].float() / 255)
        )
