"""Numbers that a file packs in blocks of some bytes each, and how they are widened."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bytes", "Packing", "nibbles"]

Bytes = NDArray[np.uint8]


class Packing(Protocol):
    """How a tensor's numbers are packed, in the order of its flattened elements."""

    @property
    def name(self) -> str:
        """What the type is called, such as Q4_K."""

    @property
    def elements(self) -> int:
        """Numbers of a block."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""

    def widen(self, blocks: Bytes, first: int) -> NDArray[np.float32]:
        """The numbers [n, elements] of blocks [n, block_bytes], which follow the tensor's `first`.

        Raises `CheckpointError` where something beside the blocks cannot be read.
        """


def nibbles(packed: NDArray[Any]) -> Bytes:
    """The low halves of bytes [..., k] before the high ones: [..., 2, k]."""
    return np.stack([packed & 15, packed >> 4], axis=-2)
