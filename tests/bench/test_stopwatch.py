"""What belongs to which part of a picture."""

from __future__ import annotations

import pytest

from fluxdeploy.bench import stopwatch as module
from fluxdeploy.bench.stopwatch import Stopwatch


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def spend(clock: Clock, seconds: float) -> None:
    clock.now += seconds


def test_a_step_is_its_transformer_and_the_host(clock: Clock) -> None:
    watch = Stopwatch()
    spend(clock, 100)  # of which nobody knows what is the first step's
    for before, transformer, after in ((0.0, 8.0, 1.0), (0.25, 4.0, 0.5)):
        spend(clock, before)
        with watch.component("transformer"):
            spend(clock, transformer)
        spend(clock, after)
        watch.end_step()
    laps = watch.laps()
    assert laps["step"] == (9.0, 4.75)
    assert laps["transformer"] == (8.0, 4.0)
    assert laps["host"] == (1.0, 0.75)


def test_two_calls_of_one_step_count_together(clock: Clock) -> None:
    watch = Stopwatch()
    for _ in range(2):  # true classifier-free guidance
        watch.wrap("transformer", lambda: spend(clock, 3))()
    watch.end_step()
    assert watch.laps()["transformer"] == (6.0,)
    assert watch.laps()["host"] == (0.0,)


def test_calls_of_other_components_are_summed(clock: Clock) -> None:
    watch = Stopwatch()
    for seconds in (2, 3):
        assert watch.wrap("vae_decoder", lambda s: spend(clock, s) or s)(seconds) == seconds
    assert watch.laps()["vae_decoder"] == (5.0,)


def test_a_new_picture_begins_with_nothing(clock: Clock) -> None:
    watch = Stopwatch()
    with watch.component("clip"):
        spend(clock, 1)
    watch.clear()
    assert watch.laps() == {"step": (), "transformer": (), "host": ()}


def test_the_device_is_waited_for_at_both_ends() -> None:
    waited: list[str] = []
    watch = Stopwatch(lambda: waited.append("wait"))
    watch.wrap("transformer", lambda: waited.append("call"))()
    assert waited == ["wait", "call", "wait"]
