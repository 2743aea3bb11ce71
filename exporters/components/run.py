"""The networks in PyTorch float32, one stage in memory at a time: what engines are held against."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from exporters.checkpoint.tensors import Weights, find_tensor
from exporters.components.chain import Chain, Piece, Stage

__all__ = [
    "ReplaceAttention",
    "linear_modules",
    "run_reference",
    "run_samples",
    "run_stage",
    "shared_inputs",
    "spent_values",
    "watch_linears",
]

Array = NDArray[np.generic]


def run_reference(
    chain: Chain,
    weights: Weights,
    inputs: Mapping[str, Array],
    on_stage: Callable[[], None] = lambda: None,
) -> dict[str, Array]:
    """Run a float32 chain with the checkpoint's weights; returns its outputs by name.

    `on_stage` hears of every stage that is done. Raises `CheckpointError` for missing tensors and
    for weights that are not finite.
    """
    return run_samples(chain, weights, [inputs], after=on_stage)[0]


def run_samples(
    chain: Chain,
    weights: Weights,
    samples: Sequence[Mapping[str, Array]],
    before: Callable[[Stage], None] = lambda stage: None,
    after: Callable[[], None] = lambda: None,
) -> list[dict[str, Array]]:
    """`run_reference` for several samples at once, reading each stage's weights a single time.

    Samples run one after the other: together they would multiply attention's scores, the largest
    tensors of all. A value is dropped after its last use, so that memory holds one stage and, of
    every sample, the values between stages.
    """
    outputs = [spec.name for spec in chain.outputs]
    held = [
        {name: torch.from_numpy(np.array(array)) for name, array in sample.items()}
        for sample in samples
    ]
    for stage, spent in zip(chain.stages, spent_values(chain), strict=True):
        before(stage)
        run_stage(stage, weights, held)
        for values in held:
            for name in spent:
                values.pop(name, None)
        after()
    return [{name: values[name].numpy() for name in outputs} for values in held]


def spent_values(chain: Chain) -> list[tuple[str, ...]]:
    """For each stage of a chain the values that nothing needs any more after it."""
    last_use = {name: number for number, stage in enumerate(chain.stages) for name in stage.reads}
    outputs = {spec.name for spec in chain.outputs}
    return [
        tuple(name for name in stage.reads if last_use[name] == number and name not in outputs)
        for number, stage in enumerate(chain.stages)
    ]


@torch.no_grad()
def run_stage(stage: Stage, weights: Weights, held: Sequence[dict[str, Tensor]]) -> None:
    """Run one stage for several samples, of each of which `held` has the chain's values by name."""
    module = stage.piece.module
    parameters = {}
    for name, parameter in module.named_parameters():
        stored = find_tensor(weights, stage.scope + name, tuple(parameter.shape))
        parameters[name] = torch.from_numpy(stored.read().reshape(stored.shape))
    for values in held:
        inputs = tuple(values[name] for name in stage.reads)
        result = torch.func.functional_call(module, parameters, inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        values.update(zip(stage.writes, outputs, strict=True))


def watch_linears(
    chain: Chain, see: Callable[[str, nn.Linear, Tensor, Tensor], None]
) -> Callable[[Stage], None]:
    """Have `see(name, linear, input, output)` called for each linear of a chain as it runs.

    A module stands for many blocks, so that the name takes the stage: returns what `run_samples`
    is to call before each.
    """
    scope = ""

    def enter(stage: Stage) -> None:
        nonlocal scope
        scope = stage.scope

    def hook(name: str, linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see(scope + name, linear, inputs[0], output)

    for piece in chain.pieces:
        for name, module in linear_modules(piece).items():
            module.register_forward_hook(functools.partial(hook, name))
    return enter


def linear_modules(piece: Piece) -> dict[str, nn.Linear]:
    """The linears of a piece by their names, in the module's order."""
    modules = piece.module.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


_EXAMPLE = {"B": 1, "S": 8, "L": 8, "T": 16, "V": 4, "N": 1}
_EXAMPLE |= {"H": 64, "W": 64, "h": 8, "w": 8}


def shared_inputs(chain: Chain) -> dict[str, str]:
    """Each linear of a chain, in the order of execution, with the first that reads its input."""
    found = {piece: _readers(piece) for piece in chain.pieces}
    return {
        stage.scope + name: stage.scope + first
        for stage in chain.stages
        for name, first in found[stage.piece].items()
    }


@torch.no_grad()
def _readers(piece: Piece) -> dict[str, str]:
    readers: list[tuple[Tensor, str]] = []
    first: dict[str, str] = {}

    def see(name: str, linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        first[name] = next((known for seen, known in readers if seen is inputs[0]), name)
        readers.append((inputs[0], name))

    hooks = [
        module.register_forward_pre_hook(functools.partial(see, name))
        for name, module in linear_modules(piece).items()
    ]
    with torch.device("meta"):
        piece.module(
            *(torch.empty(value.size(_EXAMPLE), dtype=value.dtype) for value in piece.inputs)
        )
    for hook in hooks:
        hook.remove()
    return first


_PRODUCTS = (torch.Tensor.matmul, torch.Tensor.__matmul__)


class ReplaceAttention(TorchFunctionMode):
    """While it is entered, softmax(Q Kᵀ) V is `attend(query, key, value, shares)`.

    Q, K and V are [B, heads, tokens, head_dim]; `shares` [B, heads, tokens, tokens] is the softmax.
    Attention's two products are the only ones of such tensors with each other.
    """

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._attend = attend
        self._scored: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS and all(tensor.dim() == 4 for tensor in args):
            if self._scored is not None:
                (query, key), self._scored = self._scored, None
                return self._attend(query, key, args[1], args[0])
            self._scored = args[0], args[1].mT
        return func(*args, **(kwargs or {}))
