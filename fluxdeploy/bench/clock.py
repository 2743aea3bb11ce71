"""Fair timing: contenders take turns, so that ratios are those of neighbours in time.

A machine's speed drifts with its temperature and its other work. Two contenders that run one after
the other in every round meet the same drift, and their ratio within a round hardly has it. How much
it still has shows where a contender is held against itself: its twin, which runs like any other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Laps", "Ratio", "Run", "Timing", "make_timing", "race", "turns"]

Laps = Mapping[str, tuple[float, ...]]
"""What a run took: for each quantity, the seconds of every time that it occurred in the run."""

Run = Callable[[], Laps]

SETTLE = 0.02
"""Seconds between two runs. Threads of a runtime that has just run wait for more work in a loop,
for some milliseconds, and would slow down the next contender."""


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline: of the rounds' ratios the median and the middle 80%.

    Above 1 is faster.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Seconds of one quantity: percentiles of all `count` times, and the median of each round.

    `ratio` is None where the baseline does not have the quantity.
    """

    count: int
    p50: float
    p90: float
    p99: float
    rounds: tuple[float, ...]
    ratio: Ratio | None


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: each contender once, each round begun by the next one."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def race(
    runs: Mapping[str, Run],
    rounds: int,
    warmup: int,
    on_run: Callable[[], None] = lambda: None,
    settle: float = SETTLE,
) -> dict[str, list[Laps]]:
    """Let every contender run once in each round; the laps of all rounds but the warm-up's.

    Ctrl-C ends the race: the rounds that all have finished are what is returned, and there is one
    at least, or `KeyboardInterrupt` is raised.
    """
    laps: dict[str, list[Laps]] = {name: [] for name in runs}
    try:
        for number in range(warmup + rounds):
            for name in turns(list(runs), number):
                time.sleep(settle)
                taken = runs[name]()
                if number >= warmup:
                    laps[name].append(taken)
                on_run()
    except KeyboardInterrupt:
        whole = min(map(len, laps.values()))
        if not whole:
            raise
        return {name: own[:whole] for name, own in laps.items()}
    return laps


def make_timing(
    quantity: str, own: Sequence[Laps], baseline: Sequence[Laps] | None
) -> Timing | None:
    """The timing of a quantity over equally many rounds; None where it does not occur."""
    if not own or any(quantity not in laps for laps in own):
        return None
    seconds = [value for laps in own for value in laps[quantity]]
    p50, p90, p99 = (float(value) for value in np.quantile(seconds, (0.5, 0.9, 0.99)))
    rounds = _medians(quantity, own)
    ratio = None
    if baseline is not None and all(quantity in laps for laps in baseline):
        ratio = _ratio(_medians(quantity, baseline), rounds)
    return Timing(len(seconds), p50, p90, p99, rounds, ratio)


def _medians(quantity: str, laps: Sequence[Laps]) -> tuple[float, ...]:
    return tuple(statistics.median(one[quantity]) for one in laps)


def _ratio(baseline: Sequence[float], own: Sequence[float]) -> Ratio:
    """Of rounds that were measured together."""
    ratios = [a / b for a, b in zip(baseline, own, strict=True)]
    low, median, high = (float(value) for value in np.quantile(ratios, (0.1, 0.5, 0.9)))
    return Ratio(median, low, high)
