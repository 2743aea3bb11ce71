"""OpenMP's threads in libraries such as PyTorch: how they wait for one another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["sleeping_threads"]

_VARIABLE = "OMP_WAIT_POLICY"


@contextmanager
def sleeping_threads() -> Iterator[None]:
    """Libraries that are loaded in the block have threads that sleep while they wait.

    Else they spin for milliseconds at the end of each loop, for the one that is last: where other
    programs work too, it waits for a core that a spinning one has. Small products then take ten
    times as long. A library reads the variable when it is loaded, and programs that are started
    later do not see it. What the user has set holds.
    """
    if _VARIABLE in os.environ:
        yield
        return
    os.environ[_VARIABLE] = "passive"
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
