"""Progress of long work, on stderr: live bars on a terminal; elsewhere a line for each finished
task, and one now and then while a long one runs.

with Progress() as progress:
    task = progress.task("Exporting", total=6)
    for component in components:
        ...
        task.advance()
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

from fluxdeploy.terminal import visible, write

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console, RenderableType
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Progress", "Task"]

_BEAT = 15.0
"""Seconds without a line after which a log hears how far a task is."""

_LOOK = 1.0
"""Seconds between two looks at whether it is time for such a line."""

_SLOWER = 0.1
"""Of the time that a task has taken: it is told of no more often than that."""


class Task:
    """One piece of work, made by `Progress.task`; finished once it has advanced to its total."""

    def __init__(self, owner: Progress, description: str, total: float | None) -> None:
        self.description = visible(description)
        self.total = total
        self.done = 0.0
        self._owner = owner
        self._start = time.monotonic()
        self._finished = False
        bars = owner._bars
        self._bar: TaskID | None = (
            None if bars is None else bars.add_task(self.description, total=total)
        )
        owner._running.append(self)

    def advance(self, n: float = 1) -> None:
        """Add `n` to what is done, in the unit of the total."""
        self.done += n
        if self._owner._bars is not None and self._bar is not None:
            self._owner._bars.update(self._bar, completed=self.done)
        if self.total is not None and self.done >= self.total:
            self.finish()

    def finish(self) -> None:
        """Mark the task as complete. A task without a total needs this; more calls are harmless."""
        if self._finished:
            return
        self._finished = True
        self._owner._running.remove(self)
        if self._owner._bars is not None and self._bar is not None:
            total = 1.0 if self.total is None else self.total
            self._owner._bars.update(self._bar, total=total, completed=total)
        self._owner._report(f"{self.description}: {self.seconds:.1f} s")

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self._start

    def describe(self) -> str:
        """How far it is, in words."""
        seconds, parts = self.seconds, []
        if self.total:
            parts.append(f"{self.done / self.total:.0%}")
        parts.append(f"{_duration(seconds)} so far")
        if self.total and self.done:
            parts.append(f"about {_duration(seconds * (self.total / self.done - 1))} left")
        return f"{self.description}: {', '.join(parts)}"


class Progress:
    """A context manager that shows its tasks. `quiet` shows nothing, as `--json` wants it.

    `stream` is for tests; it takes the place of stderr.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._bars: RichProgress | None = None
        self._above: RenderableType | None = None
        self._running: list[Task] = []
        self._said = time.monotonic()
        self._closed = threading.Event()
        self._pulse: threading.Thread | None = None

    def task(self, description: str, total: float | None = None) -> Task:
        """Start a task of `total` units (bytes, steps, ...), or of unknown length."""
        return Task(self, description, total)

    def note(self, line: str) -> None:
        """Say something that stays on the screen, above the bars."""
        line = visible(line)
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            self._report(line)

    @property
    def live(self) -> Console | None:
        """The terminal that bars are drawn on, while they are; None elsewhere."""
        return None if self._bars is None else self._bars.console

    def put_above(self, what: RenderableType) -> None:
        """Draw this above the bars, in the place of what was there. Nothing without a terminal."""
        self._above = what

    def __enter__(self) -> Progress:
        if self._quiet:
            return self
        if self._stream.isatty():
            self._bars = self._make_bars()
            self._bars.start()
        else:
            self._pulse = threading.Thread(target=self._beat, daemon=True)
            self._pulse.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        self._closed.set()
        if self._pulse is not None:
            self._pulse.join()

    def _beat(self) -> None:
        """Tell of the task that began last, where nothing else was told for a while."""
        while not self._closed.wait(_LOOK):
            for task in self._running[-1:]:
                if time.monotonic() - self._said >= max(_BEAT, _SLOWER * task.seconds):
                    self._report(task.describe())

    def _make_bars(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        owner = self

        class Bars(RichProgress):
            def get_renderables(self) -> Iterable[RenderableType]:
                if owner._above is not None:
                    yield owner._above
                yield from super().get_renderables()

        return Bars(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=Console(file=self._stream),
        )

    def _report(self, line: str) -> None:
        if not self._quiet and self._bars is None:
            self._said = time.monotonic()
            write(self._stream, f"{line}\n")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return "{} h {} min".format(*divmod(minutes, 60))
