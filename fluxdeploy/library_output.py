"""What libraries print: to stderr, so that stdout holds results alone."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress

__all__ = ["libraries_on_stderr"]


@contextmanager
def libraries_on_stderr() -> Iterator[None]:
    """Meanwhile, all that is printed to stdout goes to stderr, from Python and from below it.

    It is for commands, around their work: OpenVINO, compilers and converters print where they like,
    and a script that reads `--json` would stumble over it.
    """
    with redirect_stdout(sys.stderr), _descriptor():
        yield


@contextmanager
def _descriptor() -> Iterator[None]:
    """Stdout's number leads to stderr, for libraries in C and for child processes."""
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    try:
        _flush()
        with suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """Write out what is in buffers, where it belongs now."""
    with suppress(AttributeError, OSError, ValueError):
        sys.__stdout__.flush()  # type: ignore[union-attr]
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
