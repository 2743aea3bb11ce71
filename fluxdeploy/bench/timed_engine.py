"""An engine with a stopwatch before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engines import Engine
from engines.base import Array, Binding
from fluxdeploy.bench.stopwatch import Stopwatch

__all__ = ["TimedEngine"]


def _forget(outputs: Mapping[str, Array]) -> None:
    pass


class TimedEngine(Engine):
    """An engine whose calls are timed under its component's name.

    keep: hears of what each call of a binding gives.
    """

    def __init__(
        self,
        engine: Engine,
        watch: Stopwatch,
        keep: Callable[[Mapping[str, Array]], None] = _forget,
    ) -> None:
        super().__init__(engine.component, engine.inputs, engine.outputs, engine.dimensions)
        self._engine = engine
        self._watch = watch
        self._keep = keep

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with self._watch.component(self.component):
            return self._engine.run(inputs)

    def bind(self, resident: Mapping[str, Array]) -> Binding:
        return _TimedBinding(self._engine.bind(resident), self.component, self._watch, self._keep)

    def close(self) -> None:
        self._engine.close()


class _TimedBinding(Binding):
    def __init__(
        self,
        binding: Binding,
        component: str,
        watch: Stopwatch,
        keep: Callable[[Mapping[str, Array]], None],
    ) -> None:
        self._binding = binding
        self._component = component
        self._watch = watch
        self._keep = keep

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        with self._watch.component(self._component):
            outputs: Mapping[str, Any] = self._binding.run(inputs)
        self._keep(outputs)
        return outputs
