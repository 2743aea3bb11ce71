"""What the parts of a picture take, measured where they run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fluxdeploy.bench.clock import Laps

__all__ = ["Stopwatch"]


class Stopwatch:
    """Collects the laps of one picture.

    Components have one lap a picture, the sum of their calls; `transformer`, `host` and `step` have
    one a step. A step lasts from the end of the step before, the first one from its transformer
    call, to its own end; `host` is all of it that was not spent in the transformer.

    synchronize: waits for the device, which may still be at work when a call returns.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self._synchronize = synchronize
        self.clear()

    def clear(self) -> None:
        """Begin a picture."""
        self._sums: dict[str, float] = defaultdict(float)
        self._steps: list[float] = []
        self._transformer: list[float] = []
        self._in_step = 0.0
        self._step_began: float | None = None

    @contextmanager
    def component(self, name: str) -> Iterator[None]:
        """Add the block's time to a component."""
        began = self._now()
        yield
        taken = self._now() - began
        if name == "transformer":
            self._in_step += taken
            if self._step_began is None:
                self._step_began = began
        else:
            self._sums[name] += taken

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to a component."""

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.component(name):
                return function(*arguments, **named)

        return timed

    def end_step(self) -> None:
        """Mark the end of a step of the sampling loop."""
        now = self._now()
        assert self._step_began is not None, "a step without its transformer"
        self._steps.append(now - self._step_began)
        self._transformer.append(self._in_step)
        self._in_step, self._step_began = 0.0, now

    def totals(self) -> dict[str, float]:
        """The seconds in each component since `clear`, of steps that were not ended too."""
        inside = sum(self._transformer) + self._in_step
        return {**self._sums, **({"transformer": inside} if inside else {})}

    def laps(self) -> Laps:
        """What was measured since `clear`."""
        pairs = zip(self._steps, self._transformer, strict=True)
        return {
            **{name: (seconds,) for name, seconds in self._sums.items()},
            "step": tuple(self._steps),
            "transformer": tuple(self._transformer),
            "host": tuple(step - inside for step, inside in pairs),
        }

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()
