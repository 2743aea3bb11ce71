"""Progress of long work, on stderr: live bars on a terminal, one line per finished task elsewhere.

with Progress() as progress:
    task = progress.task("Exporting", total=6)
    for component in components:
        ...
        task.advance()
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Progress", "Task"]


class Task:
    """One piece of work, made by `Progress.task`; finished once it has advanced to its total."""

    def __init__(self, owner: Progress, description: str, total: float | None) -> None:
        self.description = description
        self.total = total
        self.done = 0.0
        self._owner = owner
        self._start = time.monotonic()
        self._finished = False
        bars = owner._bars
        self._bar: TaskID | None = None if bars is None else bars.add_task(description, total=total)

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
        if self._owner._bars is not None and self._bar is not None:
            total = 1.0 if self.total is None else self.total
            self._owner._bars.update(self._bar, total=total, completed=total)
        self._owner._report(f"{self.description}: {time.monotonic() - self._start:.1f} s")


class Progress:
    """A context manager that shows its tasks. `quiet` shows nothing, as `--json` wants it.

    `stream` is for tests; it takes the place of stderr.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._bars: RichProgress | None = None

    def task(self, description: str, total: float | None = None) -> Task:
        """Start a task of `total` units (bytes, steps, ...), or of unknown length."""
        return Task(self, description, total)

    def note(self, line: str) -> None:
        """Say something that stays on the screen, above the bars."""
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            self._report(line)

    def __enter__(self) -> Progress:
        if not self._quiet and self._stream.isatty():
            self._bars = self._make_bars()
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

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

        return RichProgress(
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
            self._stream.write(line + "\n")
            self._stream.flush()
