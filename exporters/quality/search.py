"""The search for a recipe: the fewest layers left in wider numbers that keep what was promised."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from exporters.quality.emulate import Emulator
from exporters.quality.judge import Judge
from exporters.quality.layers import Layers, Smoother
from exporters.quality.noise import Move, measure_noise
from fluxdeploy.bundle.recipe import NOTHING, Promise, Quality, Recipe, RecipeRecord
from fluxdeploy.progress import Progress

__all__ = ["MARGIN", "cost_of", "find_recipe"]

MARGIN = 1.5
"""dB by which pictures have to be better than was promised, since others come out otherwise."""

_ROUNDS = 8
_LEAST_ROUND = 1.0
"""dB that a round asks for at least: noises that add up as was thought need few of them."""


def find_recipe(
    emulator: Emulator,
    precision: str,
    layers: Layers,
    judge: Judge,
    promise: Promise,
    smoother: Callable[[], Smoother | None],
    progress: Progress,
) -> RecipeRecord:
    """Find what a component has to leave in wider numbers to keep a promise.

    `layers` may spare some already, which then stay. `smoother` is asked for where the promise is
    missed; it is None for a component whose inputs cannot be smoothed. Where nothing else keeps the
    promise all of them are spared.

    Raises `CheckpointError` for missing tensors, and `NumericError` for values that are not finite.
    """

    def conclude(layers: Layers, after: Quality) -> RecipeRecord:
        return RecipeRecord(
            precision, promise, layers.recipe, before, after, *cost_of(emulator, layers)
        )

    before = quality = judge.judge(layers)
    if promise.missing(quality) + MARGIN <= 0:
        return conclude(layers, quality)
    stages = len(emulator.chain.stages)
    task = progress.task("Looking for the layers that cost most", stages)
    how = smoother()
    noise = measure_noise(emulator, judge.samples, layers, how, task.advance)
    if noise.smoothed and how is not None:
        recipe = Recipe(layers.recipe.spared, noise.smoothed)
        smooth = replace(layers, recipe=recipe, smoothing=how.smooth(noise.smoothed))
        smoothed = judge.judge(smooth)
        if promise.missing(smoothed) < promise.missing(quality):
            layers, quality = smooth, smoothed
    moves = _in_order(noise.moves)
    total = sum(move.saved for move in moves)
    gain, base = 0.0, layers
    for number in range(_ROUNDS):
        missing = promise.missing(quality) + MARGIN
        if missing <= 0:
            break
        gain += max(missing, _LEAST_ROUND) * (1 + number / 4)
        left = 0.0 if number == _ROUNDS - 1 else total * 10 ** (-gain / 10)
        layers = base.sparing({**base.recipe.spared, **_spare(moves, total, left)})
        quality = judge.judge(layers)
    return conclude(layers, quality)


def _in_order(moves: Sequence[Move]) -> list[Move]:
    """The moves by what they save for their cost, best first; a layer's own stay in their order."""
    steps: dict[str, list[Move]] = defaultdict(list)
    for move in moves:
        own = steps[move.layer]
        # A second step that saves more than the first is worth taking at once.
        while own and move.saved * own[-1].cost >= own[-1].saved * move.cost:
            last = own.pop()
            move = Move(move.layer, move.left, last.saved + move.saved, last.cost + move.cost)
        own.append(move)
    every = [move for own in steps.values() for move in own]
    return sorted(every, key=lambda move: -move.saved / move.cost)


def _spare(moves: Sequence[Move], total: float, left: float) -> Mapping[str, str]:
    """What is spared by the best moves that leave no more than `left` of `total` noise."""
    spared: dict[str, str] = {}
    for move in moves:
        if total <= left:
            break
        spared[move.layer] = move.left
        total -= move.saved
    return spared


def cost_of(emulator: Emulator, layers: Layers) -> tuple[float, int]:
    """The share of a precision's weights that are not quantized, and the bytes they take more."""
    shapes = {name: emulator.weights[f"{name}.weight"].shape for name in emulator.large}
    wide = [
        shapes[name]
        for name, left in layers.recipe.spared.items()
        if left == NOTHING and name in shapes
    ]
    width = emulator.scale_bytes
    extra = sum(width * math.prod(s) - layers.format.nbytes(s, width) for s in wide)
    total = sum(math.prod(shape) for shape in shapes.values())
    return sum(math.prod(shape) for shape in wide) / total if total else 0.0, extra
