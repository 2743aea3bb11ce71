"""Whose noise it is: what each quantized layer of a component adds to its output.

Two levels keep this to one pass over the weights. A block's effect is found by running it alone in
few bits, and all that follows as it is. Within a block a layer's share is its noise at the block's
own outputs, with the layer alone in few bits. Noises of different layers hardly know of each other,
so that their powers add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporters.components.chain import Stage
from exporters.components.run import linear_modules, run_stage, spent_values
from exporters.quality.emulate import Emulator
from exporters.quality.layers import Layers, Smoother
from fluxdeploy.bundle.recipe import NOTHING, WEIGHTS

__all__ = ["Move", "Noise", "measure_noise"]

Array = NDArray[np.generic]
_Values = dict[str, Tensor]

_HELD = 256 << 20
"""Bytes of values that are held of blocks in few bits before these are followed to the end: ten of
FLUX.1's."""

_STRENGTHS = (0.5, 0.75)
_WORTH = 0.8
"""The part of an input's noise that smoothing has to leave at most, to be worth its product."""


@dataclass(frozen=True)
class Move:
    """Leaving of a layer only `left` quantized, as `Recipe.spared` has it.

    saved: the power of noise at the component's output that this takes away, over the output's.
    cost: weights whose products become wider, twice where their bytes do.
    """

    layer: str
    left: str
    saved: float
    cost: float


@dataclass(frozen=True)
class Noise:
    """What was found: the strengths that smoothing gains by, and what each spared layer saves.

    Of a layer's moves each is what it saves beyond the one before it.
    """

    smoothed: Mapping[str, float]
    moves: Sequence[Move]


def measure_noise(
    emulator: Emulator,
    samples: Sequence[Mapping[str, Array]],
    layers: Layers,
    smoother: Smoother | None,
    after: Callable[[], None] = lambda: None,
) -> Noise:
    """Measure a component's layers over its inputs, but for linears that `layers` spares already.

    Memory holds one stage's weights, and the values between two stages for some of the blocks that
    were passed: of a large network some are followed to the end before the next ones are measured.
    `after` hears of each stage that was measured. Raises `CheckpointError` for missing tensors.
    """
    chain, weights = emulator.chain, emulator.weights
    finder = _Finder(emulator, layers, smoother)
    outputs = [spec.name for spec in chain.outputs]
    steps = [*zip(chain.stages, spent_values(chain), strict=True)]
    reached = [
        {name: torch.from_numpy(np.array(array)) for name, array in sample.items()}
        for sample in samples
    ]
    effects: dict[str, float] = {}
    measured = 0
    while measured < len(steps):
        exact = [dict(values) for values in reached]
        # Of each block in few bits: the values behind it.
        disturbed: dict[str, list[_Values]] = {}
        for number, (stage, spent) in enumerate(steps[measured:], measured):
            emulator.enter(stage)
            if number == measured and _nbytes(disturbed) <= _HELD:
                found = finder.measure(stage, exact)
                measured += 1
                after()
            else:
                found = None
            followed = [*exact, *(v for held in disturbed.values() for v in held)]
            with emulator.running(None):
                run_stage(stage, weights, followed)
            if found is not None:
                disturbed[stage.scope] = found
                followed += found
            for values in followed:
                for name in spent:
                    values.pop(name, None)
            if number + 1 == measured:
                reached = [dict(values) for values in exact]
        for scope, held in disturbed.items():
            effects[scope] = _relative_power(outputs, exact, held)
    return finder.conclude(effects)


def _nbytes(disturbed: Mapping[str, Sequence[_Values]]) -> int:
    """Bytes of what is held of blocks; what several hold together counts once."""
    held = [values for samples in disturbed.values() for values in samples]
    return sum({id(t): t.nbytes for values in held for t in values.values()}.values())


class _Finder:
    def __init__(self, emulator: Emulator, layers: Layers, smoother: Smoother | None) -> None:
        self._emulator = emulator
        self._layers = layers
        self._smoother = smoother
        self._everything = dict.fromkeys((*emulator.large, *emulator.attentions), NOTHING)
        self._smoothed: dict[str, float] = {}
        # By block and layer: the powers of all its noise, and of what its weight's leaves.
        self._powers: dict[str, dict[str, tuple[float, float]]] = {}
        self._sizes: dict[str, int] = {}

    def measure(self, stage: Stage, held: Sequence[_Values]) -> list[_Values] | None:
        """Measure one stage's layers; the samples behind it in few bits, None where it has none."""
        modules = linear_modules(stage.piece)
        sizes = {stage.scope + name: module.weight.numel() for name, module in modules.items()}
        large = (name for name in self._emulator.large if name in sizes)
        own = [name for name in large if self._layers.has_weight(name)]
        if not own:
            return None
        self._sizes |= {name: sizes[name] for name in own}
        expected = self._run(stage, held, None)
        if self._smoother is not None:
            self._smooth(stage, held, expected, own)
        powers = {}
        for name in own:
            full = self._power(stage, held, expected, {name: None})
            left = full
            if self._layers.can_spare_inputs:
                left = self._power(stage, held, expected, {name: WEIGHTS})
            powers[name] = full, min(left, full)
        attention = f"{stage.scope}attn"
        if self._layers.quantization.attention and attention in self._emulator.attentions:
            powers[attention] = self._power(stage, held, expected, {attention: None}), 0.0
            self._sizes[attention] = max(self._sizes[name] for name in own) // 2
        self._powers[stage.scope] = powers
        return self._run(stage, held, self._with(dict.fromkeys(powers)))

    def _smooth(
        self, stage: Stage, held: Sequence[_Values], expected: list[_Values], own: list[str]
    ) -> None:
        assert self._smoother is not None
        for first, group in self._smoother.groups.items():
            if first not in own:
                continue
            alone: dict[str, str | None] = dict.fromkeys(n for n in group if n in own)
            best: tuple[float, Layers] | None = None
            least = _WORTH * self._power(stage, held, expected, alone)
            for strength in _STRENGTHS:
                trial = self._smoother.smooth({first: strength})
                layers = replace(self._layers, smoothing={**self._layers.smoothing, **trial})
                power = self._power(stage, held, expected, alone, layers)
                if power < least:
                    best, least = (strength, layers), power
            if best is not None:
                self._smoothed[first], self._layers = best

    def _with(self, left: Mapping[str, str | None], layers: Layers | None = None) -> Layers:
        """Only these layers in few bits: as the precision says where `left` is None."""
        spared = {n: how for n, how in {**self._everything, **left}.items() if how is not None}
        return (layers or self._layers).sparing(spared)

    def _power(
        self,
        stage: Stage,
        held: Sequence[_Values],
        expected: list[_Values],
        left: Mapping[str, str | None],
        layers: Layers | None = None,
    ) -> float:
        found = self._run(stage, held, self._with(left, layers))
        return _relative_power(stage.writes, expected, found)

    def _run(self, stage: Stage, held: Sequence[_Values], layers: Layers | None) -> list[_Values]:
        values = [dict(sample) for sample in held]
        with self._emulator.running(layers):
            run_stage(stage, self._emulator.weights, values)
        return values

    def conclude(self, effects: Mapping[str, float]) -> Noise:
        moves = []
        for scope, powers in self._powers.items():
            total = sum(full for full, _ in powers.values()) or 1.0
            for name, (full, left) in powers.items():
                share, size = effects[scope] / total, self._sizes[name]
                wider = 1 if name.endswith(".attn") else 2
                if full > left > 0:
                    moves.append(Move(name, WEIGHTS, share * (full - left), size))
                    moves.append(Move(name, NOTHING, share * left, size))
                else:
                    moves.append(Move(name, NOTHING, share * full, wider * size))
        return Noise(self._smoothed, tuple(moves))


def _relative_power(
    names: Sequence[str], expected: Sequence[_Values], found: Sequence[_Values]
) -> float:
    """The power of the differences over that of the values, of several tensors together."""
    signal = noise = 0.0
    for exact, other in zip(expected, found, strict=True):
        for name in names:
            signal += float(exact[name].double().square().sum())
            noise += float((other[name].double() - exact[name].double()).square().sum())
    return noise / signal if signal else 0.0
