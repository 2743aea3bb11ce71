"""What native libraries raise, as errors of this package: panics, and memory or threads at an end.

They have no exceptions in common. What ran out can only be told from their words, and a panic of
Rust's is no `Exception`, so that nothing catches it by accident.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fluxdeploy.errors import FluxDeployError

__all__ = ["exhausted", "native_errors", "try_threads"]

_MAX_WORDS = 600
_SEARCHED = 2000
"""Characters at both ends of a message: libraries put their stack of calls around the reason."""

_EXHAUSTED = (
    (
        # First, since these speak of memory too.
        r"(cuda|gpu).{0,40}out.?of.?memory|cudaErrorMemoryAllocation|cudaMalloc"
        r"|CU(BLAS|DNN)_STATUS_ALLOC|Requested amount of GPU memory",
        "the GPU's memory ran out; close other programs that use it, or ask for fewer or smaller "
        "pictures at once",
    ),
    (
        r"bad_?alloc|bad allocation|(failed|unable|can'?t|cannot|could not) (to )?allocate"
        r"|out of memory|not enough memory|alloc(ation)? failed|failed to map segment"
        # What ONNX Runtime says where its arena has a limit.
        r"|available memory of \d+ is smaller than requested",
        "memory ran out; close other programs, or ask for less at once",
    ),
    (
        r"can'?t start new thread|pthread_create|thread constructor|thread creation failed"
        r"|unable to create thread|resource temporarily unavailable",
        "the system starts no more threads or processes; use fewer of them with `--threads`, end "
        "other programs, or raise the limit with `ulimit -u`",
    ),
)


def exhausted(error: BaseException) -> str | None:
    """What ran out, and what to do, where `error` says that memory or threads did; else None."""
    if isinstance(error, MemoryError):
        return _EXHAUSTED[1][1]
    if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN):
        return _EXHAUSTED[1 if error.errno == errno.ENOMEM else 2][1]
    words = str(error)
    words = words[:_SEARCHED] + words[-_SEARCHED:]
    for pattern, advice in _EXHAUSTED:
        if re.search(pattern, words, re.IGNORECASE):
            return advice
    return None


def try_threads(count: int) -> None:
    """Start so many threads at once, and end them. Raises `RuntimeError` where that cannot be.

    For libraries that wait forever for those that did start, where the system starts only some.
    """
    release = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=release.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        release.set()
        for thread in started:
            thread.join()


@contextmanager
def native_errors(kind: type[FluxDeployError], what: str, advice: str = "") -> Iterator[None]:
    """Make a `kind`, "<what>: <why>. <advice>", of whatever a native library raises in the block.

    Our own errors pass, and so do Ctrl-C and the like. Where memory or threads ran out, the advice
    is what helps against that.
    """
    try:
        yield
    except FluxDeployError:
        raise
    except BaseException as error:
        # A panic's class has no public name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if (why := exhausted(error)) is not None:
            raise kind(f"{what}: {why}.") from error
        raise kind(f"{what}: {_words(error)}. {advice}".rstrip()) from error


def _words(error: BaseException) -> str:
    said = error.strerror if isinstance(error, OSError) else None
    words = " ".join((said or str(error)).split()).rstrip(".") or type(error).__name__
    return words if len(words) <= _MAX_WORDS else f"{words[:_MAX_WORDS]} ..."
