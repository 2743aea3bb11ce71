"""The networks in PyTorch float32, one stage in memory at a time: what engines are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from engines.base import Binding, Engine
from exporters.chain import Chain, Stage
from exporters.checkpoint.tensors import Weights, find_tensor

__all__ = ["ReferenceEngine", "run_reference"]

Array = NDArray[np.generic]


def run_reference(
    chain: Chain,
    weights: Weights,
    inputs: Mapping[str, Array],
    on_stage: Callable[[], None] = lambda: None,
) -> dict[str, Array]:
    """Run a float32 chain with the checkpoint's weights; returns its outputs by name.

    A value is dropped after its last use, so that memory holds one stage and its tensors.
    Raises `CheckpointError` for missing tensors.
    """
    last_use = {name: i for i, stage in enumerate(chain.stages) for name in stage.reads}
    values = {name: torch.from_numpy(np.array(array)) for name, array in inputs.items()}
    wanted = {spec.name for spec in chain.outputs}
    with torch.no_grad():
        for number, stage in enumerate(chain.stages):
            result = torch.func.functional_call(
                stage.piece.module,
                _parameters(stage, weights),
                tuple(values[name] for name in stage.reads),
            )
            outputs = result if isinstance(result, tuple) else (result,)
            values.update(zip(stage.writes, outputs, strict=True))
            for name in stage.reads:
                if last_use[name] == number and name not in wanted:
                    values.pop(name, None)
            on_stage()
    return {spec.name: values[spec.name].numpy() for spec in chain.outputs}


def _parameters(stage: Stage, weights: Weights) -> dict[str, torch.Tensor]:
    parameters = {}
    for name, parameter in stage.piece.module.named_parameters():
        stored = find_tensor(weights, stage.scope + name, tuple(parameter.shape))
        parameters[name] = torch.from_numpy(stored.read().reshape(stored.shape))
    return parameters


class ReferenceEngine(Engine):
    """A component in PyTorch float32 behind the interface of engines: a host can run on it."""

    def __init__(self, chain: Chain, weights: Weights) -> None:
        self.component = chain.component
        self.inputs = chain.inputs
        self.outputs = chain.outputs
        self.dimensions = {}
        self._chain = chain
        self._weights = weights

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return run_reference(self._chain, self._weights, inputs)

    def bind(self, resident: Mapping[str, Array]) -> Binding:
        return _ReferenceBinding(self, resident)

    def close(self) -> None:
        """Nothing is held between runs."""


class _ReferenceBinding(Binding):
    def __init__(self, engine: ReferenceEngine, resident: Mapping[str, Array]) -> None:
        self._engine = engine
        self._resident = dict(resident)

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return self._engine.run({**self._resident, **inputs})
