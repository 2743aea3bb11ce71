"""Files that are being written beside the one that they become, and those that a kill has left.

A file is locked as long as its writer lives, so that another process knows which ones are left
over: the system drops the lock of a process that is gone, however it went.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and nothing swept
    fcntl = None  # type: ignore[assignment]

__all__ = ["replacing_picture", "sweep"]

_NAME = re.compile(r"\..+\.png\.[0-9a-f]{8}\.part", re.IGNORECASE | re.DOTALL)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TRIES = 5


@contextmanager
def replacing_picture(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes the PNG at `path` where the block ends well, and vanishes where not.

    Left-overs of earlier pictures in that folder go first. Raises `OSError`.
    """
    sweep(path.parent)
    partial, file = _create(path)
    try:
        with file:
            yield file
            file.flush()
            # While it is locked: a sweep would take an unlocked one for a left-over.
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the partial pictures of writers that are gone, and nothing else.

    One is known by its name, by what it begins with, by its owner, and by a lock that nobody holds.
    What cannot be looked at or removed stays.
    """
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if _NAME.fullmatch(entry.name)]:
            with suppress(OSError):
                _remove_if_left(folder / name)


def _create(path: Path) -> tuple[Path, BinaryIO]:
    for _ in range(_TRIES):
        # In the same folder, so that the rename cannot cross file systems.
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        file = partial.open("xb")
        if fcntl is not None:
            with suppress(OSError):  # of file systems without locks: a sweep gets none there either
                fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file.fileno(), partial):
            return partial, file
        # A sweep came between the two.
        file.close()
        partial.unlink(missing_ok=True)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))


def _remove_if_left(partial: Path) -> None:
    # Not through a link, and without waiting for a pipe's other end.
    descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return
        start = os.read(descriptor, len(_SIGNATURE))
        if not _SIGNATURE.startswith(start):
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, partial):
            partial.unlink()
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False
