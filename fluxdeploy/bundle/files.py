"""Files of a bundle: hashing, linking, atomic writing, and disk errors in words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Literal

from fluxdeploy.errors import BundleError

__all__ = [
    "HashCache",
    "can_clone",
    "can_link",
    "clone",
    "disk_errors",
    "hash_files",
    "link_or_copy",
    "replacing",
    "sha256_file",
    "sync_file",
    "sync_folder",
    "user_cache",
    "write_atomic",
]

OnBytes = Callable[[int], None]
"""Called with the number of bytes just read or written, for a progress bar."""

_CHUNK = 4 << 20
_FICLONE = 0x40049409
"""Linux's call for a copy that shares blocks (linux/fs.h)."""

_HASH_THREADS = 4

_WORDS = {
    errno.ENOSPC: "the disk is full; free some space and run the command again",
    errno.EDQUOT: "your disk quota is used up; free some space and run the command again",
    errno.EACCES: "permission is denied; choose another folder or change its permissions",
    errno.EPERM: "the system does not permit it; choose another folder or change its permissions",
    errno.EROFS: "the file system is read-only; choose a folder on another one",
    errno.ENOENT: "there is no such file or folder; check the path",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another path",
    errno.EEXIST: "a file is in its place; choose another path",
    errno.EISDIR: "it is a folder, not a file; choose another path",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter path",
    errno.ELOOP: "its symbolic links lead in a circle; choose another path",
    errno.EFBIG: "the file is larger than the file system allows; choose a folder on another one",
    errno.EIO: "the disk reported a read or write error; check the disk",
    errno.EBUSY: "it is in use by the system; choose another path",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`",
}


@contextmanager
def disk_errors(what: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn every `OSError` of the block into a `BundleError`: "Cannot <what> <path>: <why>."."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        words = _WORDS.get(error.errno or 0, reason)
        raise BundleError(f"Cannot {what} {os.fspath(path)}: {words}.") from error


def sha256_file(path: str | os.PathLike[str], on_bytes: OnBytes | None = None) -> str:
    """The SHA-256 of a file as 64 hex digits. Raises `OSError` where it cannot be read.

    Memory stays at one chunk, and other threads run meanwhile.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for chunk in _chunks(file):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()


def _chunks(file: FileIO) -> Iterator[memoryview]:
    """The rest of an unbuffered file, piece by piece; a piece is valid until the next one."""
    view = memoryview(bytearray(_CHUNK))
    while count := file.readinto(view):
        yield view[:count]


def hash_files(
    paths: Iterable[str | os.PathLike[str]], on_bytes: OnBytes | None = None
) -> dict[Path, str]:
    """The SHA-256 of several files, a few at a time; `on_bytes` is never called concurrently.

    Raises `BundleError` for the first file that cannot be read. Ctrl-C, or an error, stops the
    reading of the others at their next chunk.
    """
    stop, lock = threading.Event(), threading.Lock()

    def report(count: int) -> None:
        if stop.is_set():
            raise InterruptedError
        if on_bytes is not None:
            with lock:
                on_bytes(count)

    def hash_one(path: Path) -> str:
        with disk_errors("read", path):
            return sha256_file(path, report)

    unique = list(dict.fromkeys(Path(path) for path in paths))
    if len(unique) <= 1:
        return {path: hash_one(path) for path in unique}
    with ThreadPoolExecutor(min(_HASH_THREADS, len(unique))) as pool:
        futures = {path: pool.submit(hash_one, path) for path in unique}
        try:
            return {path: future.result() for path, future in futures.items()}
        except BaseException:
            stop.set()
            for future in futures.values():
                future.cancel()
            raise


class HashCache:
    """SHA-256 sums of files on this machine that have not changed since they were hashed.

    A file is known by its real path, inode, size and modification time. The change time is left
    out on purpose: hard-linking a file into a bundle changes it. The cache only saves time: one
    that cannot be read or written is ignored.
    """

    _MARGIN_NS = 2_000_000_000
    """A file this fresh may change again without a new time stamp (FAT's are 2 s apart)."""

    _MAX_ENTRIES = 4096

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` is where the cache lies; the user's cache folder where it is not given."""
        self._path = (folder or user_cache()) / "hashes.json"

    def hash_files(
        self, paths: Iterable[str | os.PathLike[str]], on_bytes: OnBytes | None = None
    ) -> dict[Path, str]:
        """As the function `hash_files`; a known file counts as read in one go."""
        known = self._load()
        result: dict[Path, str] = {}
        before: dict[Path, list[int]] = {}
        for path in dict.fromkeys(Path(path) for path in paths):
            with disk_errors("read", path):
                before[path] = _identity(path)
            entry = known.get(os.path.realpath(path))
            if entry is not None and entry[:3] == before[path]:
                result[path] = str(entry[3])
                if on_bytes is not None:
                    on_bytes(before[path][1])
        missing = [path for path in before if path not in result]
        started = time.time_ns()
        result.update(hash_files(missing, on_bytes))
        learned: dict[str, list[int | str]] = {
            os.path.realpath(path): [*before[path], result[path]]
            for path in missing
            if before[path][2] < started - self._MARGIN_NS and _unchanged(path, before[path])
        }
        if learned:
            self._save(learned)
        return {path: result[path] for path in before}

    def _load(self) -> dict[str, list[int | str]]:
        try:
            entries = json.loads(self._path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(entries, dict):
            return {}
        return {path: entry for path, entry in entries.items() if _is_entry(entry)}

    def _save(self, learned: dict[str, list[int | str]]) -> None:
        # Read again: another process may have learned something since.
        entries = self._load()
        for path, entry in learned.items():
            entries.pop(path, None)
            entries[path] = entry
        newest = dict(list(entries.items())[-self._MAX_ENTRIES :])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, json.dumps(newest))
        except (OSError, BundleError):
            pass


def user_cache() -> Path:
    """The user's folder for what only saves time."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    root = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    return Path(root) / "fluxdeploy"


def _identity(path: Path) -> list[int]:
    status = os.stat(path)
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _unchanged(path: Path, before: list[int]) -> bool:
    try:
        return _identity(path) == before
    except OSError:
        return False


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 4
        and all(type(number) is int for number in entry[:3])
        and isinstance(entry[3], str)
        and re.fullmatch("[0-9a-f]{64}", entry[3]) is not None
    )


def can_link(source: Path, folder: Path) -> bool:
    """Whether a hard link to a file from below `folder` can probably stand for a copy.

    A link has the file's own mode: of a private file, what others may read needs a copy.
    """
    status = source.stat()
    # Linux lets others than the owner link a file only where they could write to it.
    allowed = os.name == "nt" or status.st_uid == os.geteuid() or os.access(source, os.W_OK)
    return allowed and _is_readable(status) and status.st_dev == folder.stat().st_dev


def _is_readable(status: os.stat_result) -> bool:
    """Whether a file may be read by all who may read one that is made now."""
    mask = os.umask(0o077)
    os.umask(mask)
    return not 0o444 & ~mask & ~status.st_mode


def can_clone(source: Path, folder: Path) -> bool:
    """Whether the file system can make a copy of a file below `folder` that shares its blocks.

    Tries it, in a file that is gone afterwards. Raises `BundleError` where the disk refuses.
    """
    target = _temporary(folder / source.name)
    try:
        clone(source, target)
    except _CannotCloneError:
        return False
    target.unlink()
    return True


class _CannotCloneError(BundleError):
    """The file system has no copies that share blocks, or not of this file."""


def clone(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    on_bytes: OnBytes | None = None,
) -> None:
    """Put a copy of `source` at `destination` that shares its blocks on the disk.

    For file systems that have it, such as Btrfs and XFS. Links are followed, an existing
    destination is replaced at once, and missing folders are made. Raises `BundleError` where that
    cannot be.
    """
    real, target = Path(os.path.realpath(source)), Path(destination)
    with disk_errors("read", source):
        reader = open(real, "rb", buffering=0)  # noqa: SIM115
    with reader, disk_errors("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as writer:
            try:
                _share_blocks(reader.fileno(), writer.fileno())
            except OSError as error:
                raise _CannotCloneError(
                    f"Cannot clone {os.fspath(source)} to {target}: {error.strerror}."
                ) from error
    if on_bytes is not None:
        on_bytes(os.stat(real).st_size)


def _share_blocks(source: int, target: int) -> None:
    """Let one open file have the bytes of another. Raises `OSError` where that cannot be."""
    if sys.platform != "linux":
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    import fcntl

    fcntl.ioctl(target, _FICLONE, source)


def link_or_copy(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    on_bytes: OnBytes | None = None,
) -> Literal["linked", "copied"]:
    """Put `source` at `destination`: a hard link where that is possible, else a copy.

    A private file is copied too, where others may read what is made here: see `can_link`.
    Symbolic links are followed first, since runtimes refuse those that leave a model's folder.
    An existing destination is replaced at once, never half. Missing folders are made. Raises
    `BundleError` where the source is no file or the disk refuses.
    """
    real, target = Path(os.path.realpath(source)), Path(destination)
    with disk_errors("read", source):
        status = os.stat(real)
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"Cannot copy {os.fspath(source)}: it is not a file.")
    with disk_errors("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(target)
        try:
            if not _is_readable(status):
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            os.link(real, temporary)
        except OSError:
            # Other file system, no links there, too many, not the owner: a copy always does,
            # and where it does not either, its error is the one to show.
            _copy(real, target, on_bytes)
            return "copied"
        try:
            os.replace(temporary, target)
        finally:
            # Renaming one hard link over another of the same file does nothing and keeps both.
            temporary.unlink(missing_ok=True)
    if on_bytes is not None:
        on_bytes(status.st_size)
    return "linked"


def _copy(source: Path, target: Path, on_bytes: OnBytes | None) -> None:
    with disk_errors("read", source):
        reader = open(source, "rb", buffering=0)  # noqa: SIM115
    with reader, replacing(target) as writer:
        try:
            _share_blocks(reader.fileno(), writer.fileno())
        except OSError:
            for chunk in _chunks(reader):
                writer.write(chunk)
                if on_bytes is not None:
                    on_bytes(len(chunk))
        else:
            if on_bytes is not None:
                on_bytes(os.fstat(reader.fileno()).st_size)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.

    Text is written as UTF-8. Raises `BundleError` where the disk refuses.
    """
    with disk_errors("write", path), replacing(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` where the block ends well, and vanishes where not.

    Its bytes are on the disk before it takes the name. Raises `OSError`.
    """
    target = Path(path)
    temporary = _temporary(target)
    # Not `tempfile`: its files are private, and a bundle is read by other users, as a server is.
    with open(temporary, "xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    try:
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _temporary(target: Path) -> Path:
    return target.with_name(f".tmp-{secrets.token_hex(8)}")


def sync_file(path: str | os.PathLike[str]) -> None:
    """Wait until a file's bytes are on the disk. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Wait until a folder's names are on the disk. Raises `OSError`."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
