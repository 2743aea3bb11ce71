"""Watching a reader: its time, its memory, and every file that Python opens or changes."""

from __future__ import annotations

import faulthandler
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Watch"]

_ROOT = Path(__file__).parents[2]
_CHANGES = frozenset(
    f"os.{name}"
    for name in (
        "chmod", "chown", "link", "mkdir", "remove", "rename", "rmdir", "symlink", "truncate",
        "utime",
    )
)  # fmt: skip
_NEVER = frozenset({"os.exec", "os.fork", "os.posix_spawn", "os.system", "socket.connect",
                    "subprocess.Popen"})  # fmt: skip
_PROGRAMS = frozenset({"uname", "ldconfig", "/sbin/ldconfig"})
"""What the standard library itself asks of the system."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_SYSTEM = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo")


def _changed(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """The paths that an event changes."""
    # Of a link only the new name: what it leads to stays as it is.
    places = {"os.link": (1,), "os.symlink": (1,), "os.rename": (0, 1)}.get(event, (0,))
    folder = arguments[-1] if isinstance(arguments[-1], int) and arguments[-1] >= 0 else None
    root = "" if folder is None else os.readlink(f"/proc/self/fd/{folder}")
    return [os.path.join(root, os.fsdecode(arguments[place])) for place in places]


@dataclass
class Watch:
    """Bounds one example after the other in a process of its own.

    scratch: the one folder where files may change. seconds: an example that takes longer ends the
    process, with a traceback on stderr. memory: bytes that the process may take beyond those that
    it has at the start.
    """

    scratch: Path
    seconds: float
    memory: int
    outside: list[str] = field(default_factory=list)
    slowest: float = 0.0
    _on: bool = False

    def begin(self) -> None:
        """Set the limits of the process; call it after everything was imported and tried once."""
        tempfile.tempdir = str(self.scratch)
        self._readable = tuple(
            os.path.realpath(path) + os.sep
            for path in (self.scratch, sys.prefix, sys.base_prefix, _ROOT, *sys.path)
            if path
        )
        self._writable = os.path.realpath(self.scratch) + os.sep
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + self.memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        sys.addaudithook(self._hear)

    @contextmanager
    def example(self) -> Iterator[None]:
        """One example. What it did outside is in `outside`, for the caller to look at."""
        # A thread of C, which native code that holds the interpreter cannot stop.
        faulthandler.dump_traceback_later(self.seconds, exit=True)
        started = time.perf_counter()
        self._on = True
        try:
            yield
        finally:
            self._on = False
            self.slowest = max(self.slowest, time.perf_counter() - started)
            faulthandler.cancel_dump_traceback_later()

    @property
    def peak(self) -> int:
        """The most memory that the process has had, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and not self._may_open(path, flags or 0):
                self.outside.append(f"opened {path!r}")
        elif event in _CHANGES:
            for path in _changed(event, arguments):
                parent, _ = os.path.split(os.path.abspath(path))
                # The name itself is changed, wherever it leads.
                if not self._within(parent, (self._writable,)):
                    self.outside.append(f"{event} {path!r}")
        elif event in _NEVER and arguments[0] not in _PROGRAMS:
            self.outside.append(f"{event} {arguments!r:.100}")

    def _may_open(self, path: str | bytes, flags: int) -> bool:
        if flags & _WRITES:
            return self._within(path, (self._writable, "/dev/null"))
        return self._within(path, (*self._readable, *_SYSTEM))

    @staticmethod
    def _within(path: str | bytes, folders: tuple[str, ...]) -> bool:
        name = os.path.realpath(os.fsdecode(path))
        return any(name.startswith(folder) or name == folder.rstrip(os.sep) for folder in folders)
