"""Turns and statistics: who runs when, and what is made of the times."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from fluxdeploy.bench.clock import Laps, make_timing, race, turns


def recorder(order: list[str], name: str) -> Callable[[], Laps]:
    def run() -> Laps:
        order.append(name)
        return {"picture": (float(len(order)),)}

    return run


def made_up(seed: int, rounds: int, steps: int) -> list[Laps]:
    random = np.random.default_rng(seed)
    return [{"step": tuple(random.lognormal(0, 0.5, steps).tolist())} for _ in range(rounds)]


def test_every_round_has_every_contender_once() -> None:
    order: list[str] = []
    runs = {name: recorder(order, name) for name in "abcd"}
    race(runs, rounds=6, warmup=1, settle=0)
    rounds = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert len(rounds) == 7
    assert all(sorted(one) == list("abcd") for one in rounds)


def test_each_contender_begins_as_many_rounds_as_the_others() -> None:
    firsts = Counter(turns(list("abc"), number)[0] for number in range(9))
    assert firsts == {"a": 3, "b": 3, "c": 3}


def test_rounds_for_warming_up_are_run_and_not_counted() -> None:
    order: list[str] = []
    heard: list[None] = []
    laps = race({"a": recorder(order, "a")}, 3, 2, on_run=lambda: heard.append(None), settle=0)
    assert [one["picture"] for one in laps["a"]] == [(3.0,), (4.0,), (5.0,)]
    assert len(heard) == 5


def test_percentiles_are_those_of_all_times_together() -> None:
    laps = made_up(0, rounds=5, steps=20)
    timing = make_timing("step", laps, None)
    assert timing is not None
    values = [value for one in laps for value in one["step"]]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    expected = pytest.approx((cuts[49], cuts[89], cuts[98]))
    assert (timing.p50, timing.p90, timing.p99) == expected
    assert timing.count == 100
    assert timing.rounds == tuple(statistics.median(one["step"]) for one in laps)
    assert timing.ratio is None


def test_ratios_are_of_medians_within_a_round() -> None:
    own, baseline = made_up(1, 9, 5), made_up(2, 9, 7)
    timing = make_timing("step", own, baseline)
    assert timing is not None
    assert timing.ratio is not None
    ratios = [
        statistics.median(slow["step"]) / statistics.median(fast["step"])
        for slow, fast in zip(baseline, own, strict=True)
    ]
    cuts = statistics.quantiles(ratios, n=10, method="inclusive")
    assert timing.ratio.median == pytest.approx(statistics.median(ratios))
    assert (timing.ratio.low, timing.ratio.high) == pytest.approx((cuts[0], cuts[8]))


def test_a_drift_of_the_machine_is_not_in_the_ratio() -> None:
    drift = [1.0, 1.5, 2.5, 4.0]
    own = [{"picture": (0.5 * factor,)} for factor in drift]
    baseline = [{"picture": (2.0 * factor,)} for factor in drift]
    timing = make_timing("picture", own, baseline)
    assert timing is not None
    assert timing.ratio is not None
    assert (timing.ratio.low, timing.ratio.median, timing.ratio.high) == (4.0, 4.0, 4.0)


def test_what_a_contender_does_not_have_has_no_timing() -> None:
    own: list[Laps] = [{"conditioner": (1.0,), "picture": (2.0,)}]
    other: list[Laps] = [{"picture": (3.0,)}]
    assert make_timing("conditioner", other, own) is None
    alone = make_timing("conditioner", own, other)
    assert alone is not None
    assert alone.ratio is None
    assert make_timing("cold start", [], []) is None
