"""Ctrl-C while a program is still being loaded."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["INTERRUPTED", "exit_on_interrupt"]

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 + SIGINT, as a shell reports it."""


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """In the block Ctrl-C ends the program with `INTERRUPTED`, without a traceback.

    Only where Ctrl-C would otherwise raise `KeyboardInterrupt`: who ignores it, or has a handler
    of their own, keeps that.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    try:
        signal.signal(signal.SIGINT, _exit)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _exit(*_: object) -> None:
    raise SystemExit(INTERRUPTED)
