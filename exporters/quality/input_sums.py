"""The mean and the second moments of a linear's input, added up as a network runs."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporters.formats.moments import BLOCK

__all__ = ["InputSums"]


class InputSums:
    """Sums over tokens of `columns` channels and, with `moments`, of their products in blocks."""

    def __init__(self, columns: int, moments: bool) -> None:
        self._count, self._moments = 0, moments
        self._total = torch.zeros(columns, dtype=torch.float64)
        self._blocks = math.ceil(columns / BLOCK) if moments else 0
        # Products of what differs from the first tokens' mean: of channels far from 0, float32
        # would keep little else.
        self._shift: Tensor | None = None
        self._products = torch.zeros(self._blocks, BLOCK, BLOCK, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """Add float32 [tokens, columns]."""
        self._count += len(tokens)
        self._total += tokens.sum(0, dtype=torch.float64)
        if not self._moments:
            return
        if self._shift is None:
            self._shift = tokens.mean(0)
        missing = self._blocks * BLOCK - tokens.shape[1]
        moved = torch.nn.functional.pad(tokens - self._shift, (0, missing))
        blocks = moved.view(len(tokens), self._blocks, BLOCK).permute(1, 0, 2)
        self._products += blocks.mT @ blocks

    def mean(self) -> NDArray[np.float32]:
        """[columns]"""
        return (self._total / self._count).float().numpy()

    def covariances(self) -> NDArray[np.float32]:
        """[blocks, 32, 32], with zeros for channels past the last. Needs `moments`."""
        assert self._shift is not None
        rest = self._total / self._count - self._shift
        missing = self._blocks * BLOCK - len(rest)
        rest = torch.nn.functional.pad(rest, (0, missing)).view(self._blocks, BLOCK)
        moments = self._products / self._count - rest[:, :, None] * rest[:, None]
        return moments.float().numpy()
