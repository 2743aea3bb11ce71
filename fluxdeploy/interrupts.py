"""Ctrl-C while modules are being loaded, which takes seconds where PyTorch is among them.

`KeyboardInterrupt` in the middle of an import means a traceback at the start of a program. Later
it is worse: libraries in C++ turn it into an error of their own, or abort. Nothing is lost by
ending at once instead. This module is the first one of the command line, and imports as little as
it can.
"""

from __future__ import annotations

# `signal` itself imports enum, which takes longer than all of this.
import _signal as signal  # type: ignore[import-not-found]
import os

TYPE_CHECKING = False  # and so does `typing`
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

__all__ = ["INTERRUPTED", "ExitOnInterrupt", "interrupted", "interruption"]

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 + SIGINT, as a shell reports it."""

_IMPORTING = "<frozen importlib._bootstrap>"

_message = "Interrupted."


def interrupted(resumes: bool) -> None:
    """Say from now on, where Ctrl-C ends the program, whether its work can go on later."""
    global _message
    _message = f"Interrupted{'; run the same command again to resume' if resumes else ''}."


def interruption() -> str:
    """What is said where Ctrl-C ends the program now."""
    return _message


class ExitOnInterrupt:
    """In the block Ctrl-C during an import ends the program; else it raises `KeyboardInterrupt`.

    Only where it would raise that anyway: who ignores Ctrl-C, or has a handler for it, keeps that.
    """

    def __enter__(self) -> None:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            _handle(_interrupt)

    def __exit__(self, *_: object) -> None:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            _handle(signal.default_int_handler)


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    try:  # noqa: SIM105
        signal.signal(signal.SIGINT, handler)
    except ValueError:  # only the main thread may
        pass


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            os.write(2, f"\nError: {_message}\n".encode())
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt
