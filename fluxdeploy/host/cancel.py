"""Stopping a call: a token that any thread may cancel, and turns that it can end the wait for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fluxdeploy.errors import Cancelled

__all__ = ["CancelToken", "Turns"]


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


class Turns:
    """A lock that is given in the order of asking, and may be taken again by its holder."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._holder: int | None = None
        self._depth = 0

    @contextmanager
    def taken(self, cancel: CancelToken) -> Iterator[None]:
        """Hold the lock. Raises `Cancelled` where the token is, as soon as it is."""
        cancel.check("before it began")
        with cancel.heard_by(self._wake):
            self._acquire(cancel)
        try:
            yield
        finally:
            self._release()

    def _acquire(self, cancel: CancelToken) -> None:
        me, place = threading.get_ident(), object()
        with self._changed:
            if self._holder != me:
                self._queue.append(place)
                try:
                    while self._holder is not None or self._queue[0] is not place:
                        cancel.check("while it waited for its turn")
                        self._changed.wait()
                    self._holder = me
                finally:
                    self._queue.remove(place)
                    self._changed.notify_all()
            self._depth += 1

    def _release(self) -> None:
        with self._changed:
            self._depth -= 1
            if self._depth == 0:
                self._holder = None
                self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
