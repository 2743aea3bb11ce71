"""A folder whose entries many processes share, each made once."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = ["SharedFolder"]


class SharedFolder:
    """A folder of the whole test session, whose entries are made once by whoever comes first."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entry(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `name`; if it is not there, `make` writes it to the path that it is given."""
        target = self.root / name
        with (self.root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                # Only whole entries get their name: a test that dies half-way leaves none.
                unfinished = self.root / f"{name}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                unfinished.rename(target)
        return target
