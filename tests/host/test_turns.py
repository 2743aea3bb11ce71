"""Calls change places between two steps: by priority, then by what is left for each fairly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from fluxdeploy.errors import Cancelled, QueueFullError, UsageError
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.turns import Demand, Priority, QueueLimits, Turns, check_priority

LIMIT = 20
"""Seconds after which a test that hangs gives up."""

SECOND = 1e6
"""The pixels of a step that takes a second, as it is guessed before the first call."""


class Machine:
    """Calls of so many seconds on a clock of its own: a step is a second."""

    def __init__(self, limits: QueueLimits | None = None, changing: bool = True) -> None:
        self.now = 0.0
        self.turns = Turns(limits, changing, lambda: self.now)
        self.log: list[str] = []
        self.calls: list[Future[Any]] = []
        self.pool = ThreadPoolExecutor(32)

    def call(
        self,
        name: str,
        seconds: int,
        priority: Priority = "normal",
        memory: int = 0,
        token: CancelToken | None = None,
        at_step: Callable[[int], None] = lambda step: None,
    ) -> dict[str, float]:
        cancel = CancelToken() if token is None else token
        with self.turns.taken(cancel, Demand(priority, seconds, SECOND, memory)) as turn:
            for step in range(seconds):
                turn.check("in the middle")
                at_step(step)
                self.log.append(name)
                self.now += 1
                turn.step_made()
        return turn.seconds

    def begin(self, name: str, seconds: int, *rest: Any, **others: Any) -> Future[Any]:
        """Submit a call and wait until it has its place."""
        before = len(self.turns._places)
        future = self.pool.submit(self.call, name, seconds, *rest, **others)
        until(lambda: len(self.turns._places) > before or future.done())
        return future

    def end(self, *futures: Future[Any]) -> str:
        for future in futures:
            future.result(LIMIT)
        return "".join(self.log)


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.pool.shutdown()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def with_others(
    machine: Machine, first: tuple[Any, ...], *others: tuple[Any, ...], step: int = 0
) -> str:
    """The steps in their order, where all others come in the first call's step of that number."""
    futures: list[Future[Any]] = []

    def come(now: int) -> None:
        if now == step:
            futures.extend(machine.begin(*other) for other in others)

    name, seconds, *rest = first
    begun = machine.begin(name, seconds, *rest, at_step=come)
    begun.result(LIMIT)
    return machine.end(*futures)


def test_a_higher_priority_goes_first_from_the_next_step_on(machine: Machine) -> None:
    log = with_others(machine, ("l", 4, "low"), ("n", 2), ("h", 2, "high"), step=1)
    assert log == "llhhnnll"


def test_small_pictures_do_not_wait_for_a_large_one(machine: Machine) -> None:
    """A picture of 2048x2048 at the head of the queue, and ten of 512x512 behind it."""
    log = with_others(machine, ("L", 160), *(("s", 10) for _ in range(10)))
    assert log == "L" + 100 * "s" + 159 * "L"


def test_equal_calls_are_served_in_the_order_of_coming(machine: Machine) -> None:
    assert with_others(machine, ("a", 3), ("b", 3), ("c", 3)) == "aaabbbccc"


def test_small_pictures_that_come_again_and_again_do_not_keep_a_large_one_waiting(
    machine: Machine,
) -> None:
    """With at most two others at a time, 20 seconds of work are over after three times as many."""
    futures: list[Future[Any]] = []
    small = iter(range(100))

    def again(step: int) -> None:
        if step == 0 and next(small, None) is not None:
            futures.append(machine.begin("s", 2, at_step=again))

    large = machine.begin("L", 20, at_step=again)
    large.result(LIMIT)
    while any(not future.done() for future in futures):
        machine.end(*futures)
    log = "".join(machine.log)
    assert log.index("LL") <= 60
    assert log.rindex("L") <= 80
    assert log.index("s") < 2


def test_what_may_wait_is_counted_for_a_priority_and_those_above_it() -> None:
    machine = Machine(QueueLimits(waiting=2))
    refused: list[QueueFullError] = []

    def fill(step: int) -> None:
        if step != 0:
            return
        futures.extend(machine.begin("l", 1, "low") for _ in range(2))
        with pytest.raises(QueueFullError, match="2 calls wait already") as full:
            machine.call("l", 1, "low", token=CancelToken())
        refused.append(full.value)

    futures: list[Future[Any]] = []
    # In another thread than the running call's, which would have its turn at once.
    gate, inside = threading.Event(), threading.Event()

    def hold(step: int) -> None:
        inside.set()
        assert gate.wait(LIMIT)

    running = machine.begin("r", 1, at_step=hold)
    assert inside.wait(LIMIT)
    fill(0)
    futures.append(machine.begin("h", 1, "high"))
    gate.set()
    assert machine.end(running, *futures) == "rhll"
    assert refused[0].retry_after == pytest.approx(3)
    assert machine.call("a", 1, token=CancelToken())["queued"] == 0


def test_calls_begin_while_there_is_memory_for_what_they_hold() -> None:
    machine = Machine(QueueLimits(memory=10))
    log = with_others(machine, ("a", 3, "low", 6), ("b", 2, "normal", 4), ("c", 2, "high", 5))
    # c comes first and does not fit beside a; nothing else begins before it.
    assert log == "aaaccbb"


def test_a_call_that_is_larger_than_the_memory_runs_alone() -> None:
    machine = Machine(QueueLimits(memory=10))
    assert with_others(machine, ("a", 2, "normal", 99), ("b", 2, "high", 99)) == "aabb"


def test_without_changing_places_each_call_ends_before_the_next() -> None:
    machine = Machine(changing=False)
    log = with_others(machine, ("l", 3, "low"), ("n", 2), ("h", 2, "high"))
    assert log == "lllhhnn"


def test_who_waits_to_be_alone_lets_those_end_that_have_begun(machine: Machine) -> None:
    futures: list[Future[Any]] = []

    def close() -> None:
        with machine.turns.alone():
            assert machine.turns.running == 1
            machine.log.append("!")

    def come(step: int) -> None:
        if step == 1:
            futures.append(machine.begin("h", 2, "high", at_step=closing))

    def closing(step: int) -> None:
        if step == 0:
            futures.append(machine.pool.submit(close))
            until(lambda: any(place.alone for place in machine.turns._places))
            futures.append(machine.begin("n", 1))

    machine.begin("l", 4, "low", at_step=come).result(LIMIT)
    assert machine.end(*futures) == "llhhll!n"


def test_a_callback_that_wants_to_be_alone_lets_the_others_end_first(machine: Machine) -> None:
    futures: list[Future[Any]] = []

    def come(step: int) -> None:
        if step == 1:
            futures.append(machine.begin("h", 2, "high", at_step=close))

    def close(step: int) -> None:
        if step == 1:
            with machine.turns.alone():
                machine.log.append("!")

    machine.begin("l", 4, "low", at_step=come).result(LIMIT)
    assert machine.end(*futures) == "llhll!h"


def test_a_call_that_was_pushed_aside_can_be_cancelled(machine: Machine) -> None:
    token = CancelToken()
    futures: list[Future[Any]] = []

    def come(step: int) -> None:
        if step == 0:
            futures.append(machine.begin("h", 3, "high", at_step=stop))

    def stop(step: int) -> None:
        if step == 1:
            token.cancel()
            until(low.done)

    low = machine.begin("l", 3, "low", token=token, at_step=come)
    with pytest.raises(Cancelled, match="in the middle"):
        low.result(LIMIT)
    assert machine.end(*futures) == "lhhh"
    assert machine.turns.running == machine.turns.waiting == 0


def test_a_turn_tells_how_long_it_waited_and_ran() -> None:
    machine = Machine()
    seconds: list[dict[str, float]] = []

    def come(step: int) -> None:
        if step == 0:
            other.append(machine.begin("h", 5, "high"))

    other: list[Future[Any]] = []
    seconds.append(machine.begin("l", 3, "low", at_step=come).result(LIMIT))
    machine.end(*other)
    assert seconds == [{"queued": 5.0, "encoding": 3.0}]


def test_what_a_step_takes_is_learned(machine: Machine) -> None:
    assert machine.turns.backlog() == 0
    demand = Demand(steps=1, pixels=10.0)
    with machine.turns.taken(CancelToken(), demand) as turn, turn.stage("denoising"):
        machine.now += 20
    with machine.turns.taken(CancelToken(), demand) as turn:
        assert machine.turns.backlog() == pytest.approx(20)
        turn.step_made()
        assert machine.turns.backlog() == 0


def test_nothing_is_learned_of_what_fails_and_of_opening_engines(machine: Machine) -> None:
    demand = Demand(steps=1, pixels=SECOND)
    with machine.turns.taken(CancelToken(), demand):
        machine.now += 1000
    with (
        pytest.raises(ZeroDivisionError),
        machine.turns.taken(CancelToken(), demand) as turn,
        turn.stage("denoising"),
    ):
        raise ZeroDivisionError
    with machine.turns.taken(CancelToken(), demand):
        assert machine.turns.backlog() == pytest.approx(1)


def test_the_order_does_not_hang_on_what_a_step_takes(machine: Machine) -> None:
    """As in `small_pictures_do_not_wait`, after calls that took a thousand times as long."""
    small = Demand(steps=1, pixels=1.0)
    with machine.turns.taken(CancelToken(), small) as turn, turn.stage("denoising"):
        machine.now += 1000
    log = with_others(machine, ("L", 40), *(("s", 10) for _ in range(3)))
    assert log == "L" + 30 * "s" + 39 * "L"


def test_a_nested_call_that_is_cancelled_while_others_run_gives_the_turn_back(
    machine: Machine,
) -> None:
    token = CancelToken()
    futures: list[Future[Any]] = []

    def nest(step: int) -> None:
        if step != 0:
            return
        futures.append(machine.begin("h", 2, "high", at_step=stop))
        with pytest.raises(Cancelled):
            machine.call("x", 2, token=token)
        assert machine.turns._running is not None
        assert machine.turns._running.thread == threading.get_ident()

    def stop(step: int) -> None:
        if step == 1:
            token.cancel()

    outer = machine.begin("o", 2, at_step=nest)
    outer.result(LIMIT)
    # It may have its turn back before it hears of it.
    assert machine.end(*futures).replace("x", "") == "hhoo"


def test_a_priority_that_is_none_is_refused() -> None:
    assert check_priority("low") == "low"
    with pytest.raises(UsageError, match="Use one of 'high', 'normal', 'low'"):
        check_priority("urgent")
