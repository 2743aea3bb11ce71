"""What is printed: the one door to stdout and stderr, for lines, tables and JSON.

Text comes from file names, manifests, checkpoints and pictures that others have made. A terminal
would obey what is hidden in it, so that control characters, escapes and marks that turn the
direction of text are shown as escapes: `\\x1b` in four characters.

A reader that goes away, as `head` does, does not change what a command does or its exit code.
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["open_streams", "reader_gone", "say", "say_json", "show", "visible", "write"]

_HIDDEN = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # control characters; a line is one line
    "\xad\u180e\u200b\u2060-\u2064\ufeff"  # without a width
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # of the direction of text
    "\u2028\u2029\ufff9-\ufffb"  # breaks and notes
    "\U000e0000-\U000e007f"  # tags, a second alphabet that is not shown
    "\ud800-\udfff"  # no characters: bytes of a file name that are not UTF-8
    "]"
)
"""What is not shown as it is. U+200C and U+200D are: scripts and emoji are written with them."""


def visible(text: str) -> str:
    """`text` as one line that a terminal shows and does not obey."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def say(line: str, *, err: bool = False) -> None:
    """Print one line, to stderr with `err`."""
    write(sys.stderr if err else sys.stdout, f"{visible(line)}\n")


def say_json(value: Any, indent: int | None = None) -> None:
    """Print a JSON value, all of it ASCII."""
    # The one control character that JSON leaves as it is.
    text = json.dumps(value, indent=indent).replace("\x7f", "\\u007f")
    write(sys.stdout, f"{text}\n")


def show(*parts: RenderableType, style: str | None = None) -> None:
    """Print tables of rich, and lines, below each other. Nothing in a string is markup."""
    from rich.console import Console
    from rich.text import Text

    class VisibleConsole(Console):
        def render_str(self, text: str, **settings: Any) -> Text:
            return super().render_str(visible(text), **settings)

    console = VisibleConsole(highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part, style=style)
    write(sys.stdout, captured.get())


def write(stream: TextIO, text: str) -> None:
    """Write to stdout or stderr at once. A reader that went away is not waited for.

    Raises `OSError` where stdout is a file that cannot be written.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        _silence(stream)
        if stream is not sys.stderr and not isinstance(error, BrokenPipeError):
            raise


def open_streams() -> None:
    """Prepare stdin, stdout and stderr, some of which may have been closed.

    Where one is closed, the next file that is opened would get its number, and whatever a library
    prints would land in that file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # What the encoding of the terminal has not is shown as an escape too.
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def reader_gone() -> bool:
    """Whether who read stdout or stderr has gone away; nothing more is written to them then."""
    lost = [stream for stream in (sys.stdout, sys.stderr) if _has_lost_reader(stream)]
    for stream in lost:
        _silence(stream)
    return bool(lost)


def _has_lost_reader(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # not a pipe, or not on this system
        return False


def _silence(stream: TextIO) -> None:
    """Let what is still to be written to a stream vanish."""
    with suppress(OSError, ValueError):  # one of a test has no number
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
