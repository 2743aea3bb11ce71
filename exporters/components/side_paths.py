"""Which linears of a chain have low-rank side paths, and what those give in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.components.chain import Chain, Stage
from exporters.components.run import linear_modules
from fluxdeploy.bundle.manifest import TensorSpec
from fluxdeploy.bundle.side_paths import DOWN, UP, SidePath, is_side_input, kind_of

__all__ = ["linear_names", "run_side_paths", "with_side_paths"]


def linear_names(chain: Chain) -> Iterator[str]:
    """The linears of a chain, in the order of execution, as in the diffusers layout.

    The final AdaLN's are the halves of one there.
    """
    for stage in chain.stages:
        for name in linear_modules(stage.piece):
            yield stage.scope + name


def with_side_paths(chain: Chain) -> Chain:
    """The same chain, with the inputs of a side path at every linear."""
    shapes: dict[str, tuple[int, int]] = {}
    blocks: dict[str, int] = {}
    for stage in chain.stages:
        for name, module in linear_modules(stage.piece).items():
            kind, row = kind_of(stage.scope + name)
            shapes[kind] = module.in_features, module.out_features
            blocks[kind] = max(blocks.get(kind, 0), row + 1)
    inputs = [
        TensorSpec(name, "float32", shape)
        for kind, (columns, rows) in shapes.items()
        for name, shape in SidePath(kind, blocks[kind], columns, rows).shapes.items()
    ]
    return replace(chain, inputs=(*chain.inputs, *inputs))


def run_side_paths(
    chain: Chain, inputs: Mapping[str, NDArray[np.generic]]
) -> Callable[[Stage], None]:
    """Have each linear of a chain add what its side path gives, of those that `inputs` hold.

    Returns what is to be called before each stage.
    """
    held = {
        name: torch.from_numpy(np.array(array)).float()
        for name, array in inputs.items()
        if is_side_input(name)
    }
    scope = ""

    def enter(stage: Stage) -> None:
        nonlocal scope
        scope = stage.scope

    def add(local: str, _: nn.Linear, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kind, row = kind_of(scope + local)
        if DOWN + kind not in held:
            return output
        return output + given[0] @ held[DOWN + kind][row] @ held[UP + kind][row]

    for piece in chain.pieces:
        for name, module in linear_modules(piece).items():
            module.register_forward_hook(functools.partial(add, name))
    return enter
