"""Progress on a terminal, in a log, and silenced."""

from __future__ import annotations

import io
import re
import time

import pytest

from fluxdeploy import progress as module
from fluxdeploy.progress import Progress, Task


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_line_per_finished_task() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        steps = progress.task("Steps", total=3)
        other = progress.task("Loading")
        steps.advance()
        steps.advance(2)
        other.finish()
        other.finish()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"Steps: \d+\.\d s", lines[0])
    assert re.fullmatch(r"Loading: \d+\.\d s", lines[1])


def test_an_unfinished_task_is_not_reported_as_done() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.task("Steps", total=3).advance(2)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("stream_type", [io.StringIO, FakeTerminal])
def test_quiet_writes_nothing(stream_type: type[io.StringIO]) -> None:
    stream = stream_type()
    with Progress(quiet=True, stream=stream) as progress:
        progress.task("Steps", total=1).advance()
    assert stream.getvalue() == ""


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = FakeTerminal()
    with Progress(stream=stream) as progress:
        progress.task("Steps [of] many", total=2).advance(2)
        progress.task("Loading").finish()
    text = stream.getvalue()
    assert "Steps [of] many" in text
    assert text.count("100%") >= 2


def test_what_is_put_above_the_bars_takes_the_place_of_what_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = FakeTerminal()
    with Progress(stream=stream) as progress:
        progress.task("Steps", total=2)
        progress.put_above("first")
        progress.put_above("second")
    last = stream.getvalue().rpartition("second")
    assert last[1], "it is drawn"
    assert "Steps" in last[2]
    assert "first" not in last[2]
    quiet = io.StringIO()
    with Progress(stream=quiet) as progress:
        progress.put_above("first")
        assert progress.live is None
    assert quiet.getvalue() == ""


def test_a_log_hears_of_a_long_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK", 0.01)
    monkeypatch.setattr(module, "_BEAT", 0.02)
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.task("The whole", total=2)
        steps = progress.task("  Steps", total=4)
        steps.advance()
        deadline = time.monotonic() + 10
        while stream.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        steps.advance(3)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "  Steps: 25%, 0 s so far, about 0 s left"
    assert len(lines) > 2
    time.sleep(0.05)
    assert stream.getvalue().splitlines() == lines, "nothing is said after the end"


@pytest.mark.parametrize("quiet", [True, False])
def test_silence_and_terminals_hear_nothing(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    monkeypatch.setattr(module, "_LOOK", 0.001)
    monkeypatch.setattr(module, "_BEAT", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO() if quiet else FakeTerminal()
    with Progress(quiet=quiet, stream=stream) as progress:
        progress.task("Steps", total=4)
        time.sleep(0.03)
    assert "so far" not in stream.getvalue()


@pytest.mark.parametrize(
    ("total", "done", "seconds", "words"),
    [
        (4, 1, 30, "25%, 30 s so far, about 1 min 30 s left"),
        (4, 0, 70, "0%, 1 min 10 s so far"),
        (None, 3, 5, "5 s so far"),
        (1e10, 5e9, 7260, "50%, 2 h 1 min so far, about 2 h 1 min left"),
        (100, 99, 99, "99%, 1 min 39 s so far, about 1 s left"),
    ],
)
def test_how_far_a_task_is(
    monkeypatch: pytest.MonkeyPatch, total: float | None, done: float, seconds: float, words: str
) -> None:
    task = Task(Progress(quiet=True), "Work", total)
    task.done = done
    monkeypatch.setattr(Task, "seconds", seconds)
    assert task.describe() == f"Work: {words}"
