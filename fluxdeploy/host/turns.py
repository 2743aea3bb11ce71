"""Which of several calls goes on: they share the engines, and change places between two steps.

A call of a higher priority comes first. Among equals each has a tag: the moment at which it would
end if all of them were served at once, each at the same share of the engines. The smallest tag goes
on (weighted fair queueing, Demers, Keshav and Shenker, 1989). The moments are counted in work, not
in seconds: they grow by each step's, divided by the calls that share. So a small picture does not
wait for a large one that came before it, and a large one does not wait for ever.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal, get_args

from fluxdeploy.arguments import check_integer, shown
from fluxdeploy.errors import QueueFullError, UsageError
from fluxdeploy.host.cancel import CancelToken

__all__ = ["PRIORITIES", "Demand", "Priority", "QueueLimits", "Turn", "Turns", "check_priority"]

Priority = Literal["high", "normal", "low"]

PRIORITIES: tuple[Priority, ...] = get_args(Priority)
"""The first comes first."""

_FIRST_GUESS = 1e-6
"""Seconds of a pixel's step, until a call has told."""

_NEWEST = 0.3
"""The weight of the latest call in what a pixel's step takes."""

_LOOK = 1.0
"""Seconds after which who waits looks by itself: a signal's handler may have cancelled between its
last look and its waiting."""


@dataclass(frozen=True)
class QueueLimits:
    """What a pipeline takes on.

    waiting: the calls of a priority, and of those above it, that may wait to begin; one more raises
        `QueueFullError`. None: any number.
    memory: bytes that the calls which have begun may hold together. A call that would go past it
        waits until others have ended, but for one that is alone.
    """

    waiting: int | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("waiting", 0), ("memory", 1)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least)


@dataclass(frozen=True)
class Demand:
    """What a call asks for: its steps, each so many pixels of work, and the bytes that it holds."""

    priority: Priority = "normal"
    steps: int = 0
    pixels: float = 0.0
    memory: int = 0

    @property
    def work(self) -> float:
        """Pixels times steps."""
        return self.steps * self.pixels


def check_priority(priority: object) -> Priority:
    """The priority of that name. Raises `UsageError` where there is none."""
    for known in PRIORITIES:
        if isinstance(priority, str) and priority == known:
            return known
    names = ", ".join(map(repr, PRIORITIES))
    raise UsageError(f"The priority {shown(priority)} is unknown. Use one of {names}.")


@dataclass(eq=False)
class _Place:
    """A call in the queue; `begun` ones hold memory, and at most one of them is running.

    left: the work that is not done. tag: see the module.
    """

    demand: Demand
    left: float
    tag: float
    number: int
    wake: threading.Condition
    thread: int
    begun: bool = False
    alone: bool = False

    @property
    def order(self) -> tuple[int, float, int]:
        return PRIORITIES.index(self.demand.priority), self.tag, self.number


_ORDER = attrgetter("order")


@dataclass
class _Clock:
    """How long a call ran in each of its stages, and how long it waited between."""

    now: Callable[[], float]
    seconds: dict[str, float] = field(default_factory=dict)
    stage: str = "queued"
    since: float = 0.0

    def enter(self, stage: str) -> None:
        """Begin a stage, and count the seconds of the one before."""
        now = self.now()
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self.since
        self.stage, self.since = stage, now


class Turn:
    """A call that has its turn: between two pieces of its work, others may have theirs."""

    def __init__(
        self, turns: Turns, place: _Place, demand: Demand, cancel: CancelToken, clock: _Clock
    ) -> None:
        self._turns = turns
        self._place = place
        self._demand = demand
        self._cancel = cancel
        self._clock = clock

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, as far as they are over; "queued" are those of waiting."""
        return dict(self._clock.seconds)

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Meanwhile, count the seconds for this stage."""
        outer = self._clock.stage
        self.enter(stage)
        try:
            yield
        finally:
            self.enter(outer)

    def enter(self, stage: str) -> None:
        """Count the seconds from here on for this stage."""
        self._clock.enter(stage)

    def step_made(self) -> None:
        """Note that a step of the call was made."""
        self._turns.worked(self._place, self._demand.pixels)

    def check(self, where: str) -> None:
        """Raise `Cancelled` where the call was; let a call go first that comes before this one."""
        self._cancel.check(where)
        if not self._turns.is_next(self._place):
            with self.stage("queued"):
                self._turns.wait(self._place, self._cancel, where)


class Turns:
    """The queue of a pipeline's calls.

    limits: what it takes on.
    changing: whether calls change places before they have ended.
    clock: the seconds of now.
    steps: those of all calls that were made so far.
    """

    def __init__(
        self,
        limits: QueueLimits | None = None,
        changing: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._limits = QueueLimits() if limits is None else limits
        self._changing = changing
        self._clock = clock
        # Reentrant: a signal's handler may cancel while this thread is in here.
        self._lock = threading.RLock()
        self._places: list[_Place] = []
        self._running: _Place | None = None
        self._numbers = itertools.count()
        self._now = 0.0
        self._rate: float | None = None
        self.steps = 0

    @property
    def waiting(self) -> int:
        """The calls that wait to begin."""
        with self._lock:
            return sum(not place.begun for place in self._places)

    @property
    def running(self) -> int:
        """The calls that have begun and not ended."""
        with self._lock:
            return sum(place.begun for place in self._places)

    def backlog(self) -> float:
        """About how many seconds all calls take that are here."""
        with self._lock:
            rate = _FIRST_GUESS if self._rate is None else self._rate
            return rate * sum(place.left for place in self._places)

    @contextmanager
    def taken(self, cancel: CancelToken, demand: Demand) -> Iterator[Turn]:
        """Have a turn. Who has one already, and calls from its callback, has another at once.

        Raises `Cancelled` where the token is, as soon as it is, and `QueueFullError`.
        """
        cancel.check("before it began")
        clock = _Clock(self._clock, since=self._clock())
        with self._lock:
            outer = self._own_place()
            place = self._enter(demand) if outer is None else outer
        turn = Turn(self, place, demand, cancel, clock)
        if outer is not None:
            try:
                turn.enter("encoding")
                yield turn
                turn.enter("ended")
            finally:
                # A call that was cancelled while others went first has left the outer one waiting.
                if self._running is not place:
                    self.wait(place, CancelToken(), "")
            return
        try:
            self.wait(place, cancel, "while it waited for its turn")
            turn.enter("encoding")
            yield turn
            turn.enter("ended")
            self._learn(turn.seconds.get("denoising", 0.0), demand.work)
        finally:
            self._leave(place)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have a turn in which no other call has begun; others begin after it."""
        token = CancelToken()
        with self._lock:
            outer = self._own_place()
            place = self._enter(Demand(PRIORITIES[0])) if outer is None else outer
            place.alone = True
        try:
            self.wait(place, token, "while it waited for its turn")
            yield
        finally:
            place.alone = False
            if outer is None:
                self._leave(place)

    def worked(self, place: _Place, work: float) -> None:
        """Note that a call made a step of so much work."""
        with self._lock:
            self.steps += 1
            peers = sum(each.demand.priority == place.demand.priority for each in self._places)
            self._now += work / max(peers, 1)
            place.left = max(place.left - work, 0.0)

    def is_next(self, place: _Place) -> bool:
        """Whether the running call goes on."""
        with self._lock:
            return self._best() is place

    def wait(self, place: _Place, cancel: CancelToken, where: str) -> None:
        """Give the turn away, and wait for the next. Raises `Cancelled`, without a turn then."""

        def wake() -> None:
            with self._lock:
                place.wake.notify()

        with cancel.heard_by(wake), self._lock:
            if self._running is place:
                self._running = None
            self._pass_on()
            while self._running is not place:
                cancel.check(where)
                place.wake.wait(_LOOK)
            place.begun = True

    def _own_place(self) -> _Place | None:
        running = self._running
        return running if running and running.thread == threading.get_ident() else None

    def _enter(self, demand: Demand) -> _Place:
        most = self._limits.waiting
        rank = PRIORITIES.index(demand.priority)
        before = [place for place in self._places if not place.begun and place.order[0] <= rank]
        # What can begin at once waits for nothing, even where nobody may wait.
        if most is not None and len(before) + (self._running is not None) > most:
            raise QueueFullError(
                f"{len(before)} calls wait already, as many as may. Try again later.",
                self.backlog(),
            )
        place = _Place(
            demand=demand,
            left=demand.work,
            tag=self._now + demand.work,
            number=next(self._numbers),
            wake=threading.Condition(self._lock),
            thread=threading.get_ident(),
        )
        self._places.append(place)
        return place

    def _leave(self, place: _Place) -> None:
        with self._lock:
            self._places.remove(place)
            if self._running is place:
                self._running = None
            self._pass_on()

    def _learn(self, seconds: float, work: float) -> None:
        """Take a call that went well for what a pixel's step takes."""
        if seconds > 0 and work > 0:
            with self._lock:
                rate = seconds / work
                old = rate if self._rate is None else self._rate
                self._rate = old + _NEWEST * (rate - old)

    def _pass_on(self) -> None:
        """Give the turn to who is next, where nobody has it."""
        if self._running is None and (best := self._best()) is not None:
            self._running = best
            best.wake.notify()

    def _best(self) -> _Place | None:
        """The place that comes first of those that can go on or begin."""
        begun = [place for place in self._places if place.begun]
        alone = [place for place in self._places if place.alone]
        if alone:
            # Who waits to be alone lets those end that have begun, and none begin.
            able = [place for place in begun if not place.alone] or begun or alone
            return min(able, key=_ORDER)
        able = begun
        new = min((place for place in self._places if not place.begun), key=_ORDER, default=None)
        if new is not None and self._may_begin(new, begun):
            able = [*able, new]
        return min(able, key=_ORDER, default=None)

    def _may_begin(self, place: _Place, begun: list[_Place]) -> bool:
        if not begun:
            return True
        most = math.inf if self._limits.memory is None else self._limits.memory
        held = sum(each.demand.memory for each in begun)
        return self._changing and held + place.demand.memory <= most
