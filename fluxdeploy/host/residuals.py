"""What ControlNets add inside the transformer: run, scaled and summed for each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.base import Array, Engine
from fluxdeploy.bundle.boundary import RESIDUALS
from fluxdeploy.host.batches import run_in_parts
from fluxdeploy.host.prompts import Condition

__all__ = ["ControlResiduals", "RunningControlNet", "zero_residuals"]

Residuals = Mapping[str, NDArray[np.float32]]
"""`double_residuals` and `single_residuals`, float32 [n, B, L, D], for the transformer."""


@dataclass(frozen=True)
class RunningControlNet:
    """A ControlNet of a call.

    condition: what the prompts make of it. latents: float32 [B, L, C], what it is controlled by.
    scales: float32 [N], what its residuals are multiplied with in each step; with 0 it is not run.
    """

    engine: Engine
    condition: Condition
    latents: NDArray[np.float32]
    scales: NDArray[np.float32]


class ControlResiduals:
    """The residuals of a call's ControlNets, in the step number `step`, which its loop sets.

    As in diffusers they come from the prompts alone: where there are negative prompts too, the
    evaluation for those takes what was computed for the others at the same latents.

    transformer: takes the residuals. tables: `rope_cos` and `rope_sin`. keep: whether there are
    negative prompts. between: called between runs, to end them.
    """

    def __init__(
        self,
        transformer: Engine,
        controlnets: Sequence[RunningControlNet],
        tables: Mapping[str, Array],
        keep: bool,
        between: Callable[[], None],
    ) -> None:
        self.step = 0
        self._transformer = transformer
        self._controlnets = controlnets
        self._tables = tables
        self._keep = keep
        self._between = between
        self._kept: dict[int, Residuals] = {}

    def compute(self, level: int, latents: NDArray[np.float32], part: slice) -> Residuals:
        """For some pictures of the batch: a `part` of it, with latents float32 [b, L, C]."""
        total: dict[str, NDArray[np.float32]] = {}
        counts = _counts(self._transformer)
        for controlnet in self._controlnets:
            scale = controlnet.scales[self.step]
            if scale == 0:
                continue
            given = self._run(controlnet, level, latents, part)
            for name, count in counts.items():
                if name in given:
                    values = np.asarray(given[name][:count], np.float32)
                    if scale != 1:
                        np.multiply(values, scale, out=values)
                    if name in total:
                        np.add(total[name], values, out=values)
                    total[name] = values
        if total.keys() != counts.keys():
            zeros = zero_residuals(self._transformer, *latents.shape[:2])
            total = {**zeros, **total}
        if self._keep:
            self._kept[part.start] = total
        return total

    def recall(self, level: int, latents: NDArray[np.float32], part: slice) -> Residuals:
        """What was computed for the same pictures last."""
        return self._kept[part.start]

    def _run(
        self, controlnet: RunningControlNet, level: int, latents: NDArray[np.float32], part: slice
    ) -> Mapping[str, Array]:
        condition = controlnet.condition
        rows = condition.pictures[part]
        inputs = {
            "hidden_states": latents,
            "control_latents": controlnet.latents[part],
            "context": condition.context[rows],
            "modulation": condition.modulation[level][rows],
            **self._tables,
        }
        if condition.mode is not None:
            inputs["mode"] = condition.mode[rows]
        return run_in_parts(controlnet.engine, inputs, self._between)


def zero_residuals(transformer: Engine, pictures: int, tokens: int) -> Residuals:
    """What a transformer is given where no ControlNet runs; nothing where it takes nothing."""
    widths = {spec.name: spec.shape[-1] for spec in transformer.inputs}
    return {
        name: np.zeros((count, pictures, tokens, int(widths[name])), np.float32)
        for name, count in _counts(transformer).items()
    }


def _counts(transformer: Engine) -> dict[str, int]:
    """How many residuals of each kind of blocks a transformer takes."""
    return {s.name: int(s.shape[0]) for s in transformer.inputs if s.name in RESIDUALS}
