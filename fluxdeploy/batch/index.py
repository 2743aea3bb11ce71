"""The index of a batch: a line of JSON for each picture that is written.

It is what a batch is resumed from. A line is added whole, after its picture is in place; one that
a kill has cut off is removed by who opens the index next. Of two lines with one path the later
counts.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fluxdeploy.bundle.typed_json import load_strict, parse, to_plain
from fluxdeploy.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

__all__ = ["Entry", "Index"]


@dataclass(frozen=True)
class Entry:
    """A picture that is written.

    path: relative to the index, with forward slashes. index: which of its call. request: the
    digest of what was asked for. seconds: of its call, divided among the call's pictures.
    """

    path: str
    prompt: str
    seed: int
    index: int
    width: int
    height: int
    num_inference_steps: int
    seconds: float
    bytes: int
    sha256: str
    request: str


class Index:
    """An index file, opened for one process; a context manager.

    Raises `UsageError` where another process has it open, or where the file is something else, and
    `OSError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._entries = {entry.path: entry for entry in self._read()}
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def find(self, path: Path, request: str) -> Entry | None:
        """The entry of a picture of this request that is still where it was written."""
        entry = self._entries.get(self.relative(path))
        if entry is None or entry.request != request:
            return None
        try:
            return entry if path.stat().st_size == entry.bytes else None
        except OSError:
            return None

    def relative(self, path: Path) -> str:
        """A picture's path as its entry has it."""
        return Path(os.path.relpath(path, self.path.parent)).as_posix()

    def add(self, entry: Entry) -> None:
        """Add a line. Where the disk refuses, the index is as it was. Raises `OSError`."""
        line = json.dumps(to_plain(entry)).encode("ascii") + b"\n"
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            os.ftruncate(self._file, before)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._entries[entry.path] = entry

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UsageError(
                    f"Another process is making the pictures of {self.path}. Wait until it ends, "
                    "or name other pictures with --out."
                ) from None
            # A file system without locks.

    def _read(self) -> Iterator[Entry]:
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                yield parse(Entry, load_strict(line.decode("utf-8")))
            except ValueError as error:
                raise UsageError(
                    f"{self.path}, line {number} is no entry of an index: {error}. Move the file "
                    "away: all pictures are then drawn again."
                ) from error
        if whole == 0 and data and not data.startswith(b"{"):
            raise UsageError(f"{self.path} is no index of pictures. Move the file away.")
        if whole < len(data):
            os.ftruncate(self._file, whole)
