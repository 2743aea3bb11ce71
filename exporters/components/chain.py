"""A component as a chain of stages, so that a repeated block is traced once.

FLUX.1 is 57 transformer blocks of two kinds, T5 24 of one. Tracing each of them is nearly all the
time that an export takes, and holding each of them nearly all the memory of a float32 reference.
A `Chain` says which module runs where in the order of execution; `exporters.graph.trace` traces
each distinct `Piece` once and repeats it, `exporters.components.run` runs the stages one at a time
in PyTorch with the weights of a single stage in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fluxdeploy.bundle.manifest import Dimension, TensorSpec

__all__ = ["Chain", "Piece", "Stage", "Value"]


@dataclass(frozen=True)
class Value:
    """Type of a tensor between stages: a dtype and a shape of sizes and symbols."""

    dtype: torch.dtype
    shape: tuple[Dimension, ...]

    def size(self, example: dict[str, int]) -> tuple[int, ...]:
        """The shape with each symbol replaced by its example size."""
        return tuple(example[d] if isinstance(d, str) else d for d in self.shape)


@dataclass(frozen=True, eq=False)
class Piece:
    """A module on the meta device and the types of its positional inputs. Traced once."""

    module: nn.Module
    inputs: tuple[Value, ...]


@dataclass(frozen=True)
class Stage:
    """A use of a piece.

    `reads` and `writes` name the values of the chain. A parameter `p` of the module is the
    checkpoint's tensor `scope + p`.
    """

    piece: Piece
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    scope: str = ""


@dataclass(frozen=True)
class Chain:
    """A component: its boundary, as in the manifest, and its stages in order."""

    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    stages: tuple[Stage, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The distinct pieces, in the order of their first use."""
        return tuple(dict.fromkeys(stage.piece for stage in self.stages))
