"""Batches that are larger than an engine takes: it runs several times, each time on a part.

How many an engine takes decides how long a call lasts, and never what comes out of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np

from engines.base import Array, Engine

__all__ = ["divide", "run_in_parts"]

_BATCH = "B"


def divide(engine: Engine, batch: int) -> list[slice]:
    """The parts of a batch that an engine takes, in order: as few, and as even, as can be."""
    allowed = engine.dimensions.get(_BATCH)
    count = 1 if allowed is None else -(-batch // allowed.max)
    ends = [-(-batch * part // count) for part in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def run_in_parts(
    engine: Engine, inputs: Mapping[str, Array], between: Callable[[], None]
) -> dict[str, Array]:
    """Run an engine on a batch of any size; the outputs are those of the whole.

    between: called between the runs of the parts; what it raises ends them.
    """
    axes = {
        spec.name: spec.shape.index(_BATCH)
        for spec in (*engine.inputs, *engine.outputs)
        if _BATCH in spec.shape
    }
    sizes = {inputs[name].shape[axes[name]] for name in inputs if name in axes}
    # Inputs that have no batch, or do not agree on it, are the engine's to take or to refuse.
    batch = sizes.pop() if len(sizes) == 1 else None
    parts = [slice(None)] if batch is None else divide(engine, batch)
    if batch is None or len(parts) == 1:
        return engine.run(inputs)
    whole: dict[str, Array] = {}
    for part in parts:
        if whole:
            between()
        outputs = engine.run(
            {
                name: array[_rows(axes[name], part)] if name in axes else array
                for name, array in inputs.items()
            }
        )
        for name, values in outputs.items():
            if name not in whole:
                shape = list(values.shape)
                shape[axes[name]] = batch
                whole[name] = np.empty(shape, values.dtype)
            whole[name][_rows(axes[name], part)] = values
    return whole


def _rows(axis: int, part: slice) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, part)
