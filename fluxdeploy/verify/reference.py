"""A component in PyTorch float32 behind the interface of engines, so that the host runs on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from engines.base import Array, Binding, Engine

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

__all__ = ["ReferenceEngine"]


class ReferenceEngine(Engine):
    """One stage is in memory at a time; nothing is held between runs. Needs PyTorch."""

    def __init__(self, checkpoint: Checkpoint, component: str) -> None:
        from exporters.components.registry import find_component

        self._chain, self._weights = find_component(component).source(checkpoint, "fp32")
        super().__init__(component, self._chain.inputs, self._chain.outputs, {})

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        from exporters.components.run import run_reference

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
