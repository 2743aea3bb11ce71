"""Progress on a terminal, in a log, and silenced."""

from __future__ import annotations

import io
import re

import pytest

from fluxdeploy.progress import Progress


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
