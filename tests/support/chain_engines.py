"""Engines that run a component's chain in PyTorch: nothing is traced or built for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.base import Binding, Engine
from exporters.checkpoint import Weights
from exporters.components.chain import Chain
from exporters.components.run import run_reference

__all__ = ["ChainEngine"]


class ChainEngine(Engine):
    """A chain with its weights, in float32. `runs` counts how often it was run."""

    def __init__(self, chain: Chain, weights: Weights) -> None:
        super().__init__(chain.component, chain.inputs, chain.outputs, {})
        self.runs = 0
        self._chain, self._weights = chain, weights

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.runs += 1
        assert set(inputs) == {spec.name for spec in self.inputs}
        return run_reference(self._chain, self._weights, inputs)

    def bind(self, resident: Mapping[str, Any]) -> Binding:
        return _Bound(self, resident)

    def close(self) -> None:
        pass


class _Bound(Binding):
    def __init__(self, engine: ChainEngine, resident: Mapping[str, Any]) -> None:
        self._engine, self._resident = engine, dict(resident)

    def run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._engine.run({**self._resident, **inputs})
