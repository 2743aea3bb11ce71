"""Checking tensors against an engine's boundary, in words a caller can act on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from fluxdeploy.bundle.manifest import DimensionRange, TensorSpec
from fluxdeploy.errors import EngineError

__all__ = ["BoundInputs", "Found", "check_boundary", "check_inputs", "output_shape"]

_REBUILD = "Build the bundle again with `fluxdeploy build`."

Found = Mapping[str, tuple[str, tuple[int | None, ...]]]
"""What a graph has: for each tensor its dtype, and its sizes, None where one is free."""


def check_boundary(engine: Engine, inputs: Found, outputs: Found) -> None:
    """Hold what a manifest says of an engine's tensors against the graph that was opened.

    Raises `EngineError` for a graph that takes other tensors, or does not give those.
    """
    for side, specs, found in (
        ("inputs", engine.inputs, inputs),
        ("outputs", engine.outputs, outputs),
    ):
        wanted = {spec.name: spec for spec in specs}
        missing = wanted.keys() - found.keys()
        # What else a graph gives is left alone; what else it takes would be missing in each run.
        surplus = found.keys() - wanted.keys() if side == "inputs" else set()
        if missing or surplus:
            raise EngineError(
                f"The manifest says that {engine.component} has the {side} {', '.join(wanted)}, "
                f"and its graph has {', '.join(found) or 'none'}. {_REBUILD}"
            )
        for name, spec in wanted.items():
            dtype, sizes = found[name]
            if dtype != spec.dtype or not _fits(spec, sizes, engine.dimensions):
                shown = ["free" if size is None else size for size in sizes]
                raise EngineError(
                    f"The manifest says that {name} of {engine.component} is {spec.dtype} "
                    f"{list(spec.shape)}, and its graph has {dtype} {shown}. {_REBUILD}"
                )


def _fits(
    spec: TensorSpec, sizes: tuple[int | None, ...], dimensions: Mapping[str, DimensionRange]
) -> bool:
    if len(sizes) != len(spec.shape):
        return False
    for wanted, size in zip(spec.shape, sizes, strict=True):
        if size is None or size == wanted:
            continue
        allowed = dimensions.get(wanted) if isinstance(wanted, str) else None
        if allowed is None or not allowed.min == size == allowed.max:
            return False
    return True


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
