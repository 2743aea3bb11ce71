"""Stopping a call: a token that any thread may cancel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from fluxdeploy.errors import Cancelled

__all__ = ["CancelToken", "Checked"]


class Checked(Protocol):
    """What is asked between two pieces of a call's work whether the call goes on."""

    def check(self, where: str) -> None:
        """Raise `Cancelled` where it does not; `where` says how far the call has come."""


class CancelToken:
    """Ends the calls of `FluxPipeline` that were given it as `cancel=`: they raise `Cancelled`.

    It may be cancelled by any thread, by a callback, and before a call begins; it stays cancelled.
    Several calls may share one.
    """

    def __init__(self) -> None:
        self._cancelled = False
        self._listeners: list[Callable[[], None]] = []
        # Reentrant: a signal's handler may cancel while this thread is in here.
        self._lock = threading.RLock()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """End the calls that have this token. More calls are harmless."""
        with self._lock:
            self._cancelled = True
            listeners = tuple(self._listeners)
        # Without the lock: a listener takes one of its own, under which others come for this one.
        for listener in listeners:
            listener()

    def check(self, where: str) -> None:
        """Raise `Cancelled` where `cancel` was called; `where` says how far the call has come."""
        if self._cancelled:
            raise Cancelled(f"Cancelled {where}; no picture was made.")

    @contextmanager
    def heard_by(self, listener: Callable[[], None]) -> Iterator[None]:
        """Meanwhile, call `listener` when the token is cancelled, in the thread that does so."""
        with self._lock:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)
