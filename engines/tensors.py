"""Checking tensors against an engine's boundary, in words a caller can act on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from fluxdeploy.bundle.manifest import DimensionRange, TensorSpec
from fluxdeploy.errors import EngineError

__all__ = ["BoundInputs", "check_inputs", "output_shape"]


def check_inputs(
    component: str,
    specs: Iterable[TensorSpec],
    dimensions: Mapping[str, DimensionRange],
    inputs: Mapping[str, NDArray[Any]],
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Hold tensors against their specs; returns the size of each symbol in their shapes.

    `sizes` are symbols that earlier tensors fixed. Raises `EngineError` for a missing or unknown
    tensor, a wrong type or shape, and a size outside the engine's range.
    """
    wanted = {spec.name: spec for spec in specs}
    for name in sorted(wanted.keys() ^ inputs.keys()):
        what = "is missing" if name in wanted else "is not one of its inputs"
        raise EngineError(
            f"{component}: tensor {name} {what}; the inputs here are {', '.join(wanted)}."
        )
    found = dict(sizes or {})
    for name, spec in wanted.items():
        array = inputs[name]
        if array.dtype != np.dtype(spec.dtype):
            raise EngineError(f"{component}: {name} is {array.dtype}; {spec.dtype} is needed.")
        shape = array.shape
        fits = len(shape) == len(spec.shape) and all(
            size == (found.setdefault(d, size) if isinstance(d, str) else d)
            for d, size in zip(spec.shape, shape, strict=True)
        )
        if not fits:
            known = [found.get(d, d) if isinstance(d, str) else d for d in spec.shape]
            raise EngineError(
                f"{component}: {name} has shape {list(shape)}; {known} is needed "
                f"(that is {list(spec.shape)})."
            )
    for symbol, allowed in dimensions.items():
        size = found.get(symbol)
        if size is not None and not allowed.min <= size <= allowed.max:
            raise EngineError(
                f"{component}: dimension {symbol} is {size}; this engine takes {allowed.min} to "
                f"{allowed.max}."
            )
    return found


def output_shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape of an output, or None where a symbol of it is not one of the inputs'."""
    shape = [sizes.get(d) if isinstance(d, str) else d for d in spec.shape]
    return None if None in shape else tuple(d for d in shape if d is not None)


class BoundInputs:
    """A binding's inputs: `resident` are in place, `changing` come with every call.

    Raises `EngineError` where the tensors to put in place do not fit the engine.
    """

    def __init__(self, engine: Engine, resident: Mapping[str, NDArray[Any]]) -> None:
        self.resident = tuple(spec for spec in engine.inputs if spec.name in resident)
        self.changing = tuple(spec for spec in engine.inputs if spec.name not in resident)
        self._component = engine.component
        self._dimensions = engine.dimensions
        self._sizes = check_inputs(self._component, self.resident, self._dimensions, resident)

    def check(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """Hold a call's tensors against `changing`; returns the size of every symbol.

        Raises `EngineError` as `check_inputs` does.
        """
        return check_inputs(self._component, self.changing, self._dimensions, inputs, self._sizes)
