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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

from fluxdeploy.errors import BundleError

__all__ = [
    "SMALL",
    "CacheFile",
    "FileIdentity",
    "HashCache",
    "can_clone",
    "can_link",
    "clone",
    "disk_errors",
    "hash_files",
    "is_private",
    "link_or_copy",
    "open_regular",
    "owner_problem",
    "read_whole",
    "replacing",
    "sha256_file",
    "sync_file",
    "sync_folder",
    "user_cache",
    "write_atomic",
]

OnBytes = Callable[[int], None]
"""Called with the number of bytes just read or written, for a progress bar."""

SMALL = 64 << 20
"""Bytes of a file up to which opening a bundle hashes it."""

_CHUNK = 4 << 20
_FICLONE = 0x40049409
"""Linux's call for a copy that shares blocks (linux/fs.h)."""

_HASH_THREADS = 4
_MAX_CACHE = 4 << 20
"""Bytes of a file of the cache: entries of the largest have some 200 each."""

_READ_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
)
"""Another file may take the name after it was looked at; these make opening harmless then."""

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

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


def read_whole(path: str | os.PathLike[str], limit: int) -> bytes:
    """All bytes of a regular file that has at most `limit` of them; links are followed.

    Never waits for a pipe's writer, and never holds more than `limit` bytes, also of a file that
    grows or whose size the system does not know, as in /proc. Raises `OSError` with the reason
    as its `strerror`: the file cannot be read, is of another kind, or has too many bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(0, f"it has {size} bytes, and at most {limit} are allowed")
        data = bytearray()
        while chunk := file.read(min(_CHUNK, limit + 1 - len(data))):
            data += chunk
            if len(data) > limit:
                raise OSError(0, f"it has more than the {limit} bytes that are allowed")
    return bytes(data)


def open_regular(path: str | os.PathLike[str]) -> FileIO:
    """Open a regular file to read it, unbuffered; links are followed.

    Never waits for a pipe's writer. Raises `OSError` for a file that cannot be opened or is of
    another kind, with the reason as its `strerror`.
    """
    # Asked before opening: that alone waits for a pipe's writer, or does something to a device.
    _check_regular(os.stat(path))
    descriptor = os.open(path, _READ_FLAGS)
    try:
        _check_regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return FileIO(descriptor)


def _check_regular(status: os.stat_result) -> None:
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a regular file")
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "of an unknown kind")
        raise OSError(0, f"it is {kind}, not a regular file")


def sha256_file(path: str | os.PathLike[str], on_bytes: OnBytes | None = None) -> str:
    """The SHA-256 of a file as 64 hex digits. Raises `OSError` where it cannot be read.

    Memory stays at one chunk, and other threads run meanwhile.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
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


@dataclass(frozen=True)
class FileIdentity:
    """Which file it is, and when it was changed: of one file, an equal identity is equal bytes.

    `modified` can be set to any time by whoever may write the file, `changed` by nobody. But
    hard-linking and unlinking a file, or a change of its permissions, moves `changed` too: another
    `changed` alone says that the bytes may be others. Times are in nanoseconds.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileIdentity:
        """That of the file that `path` leads to. Raises `OSError`."""
        status = os.stat(path)
        return cls(
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )

    def may_equal(self, other: FileIdentity) -> bool:
        """Whether nothing tells of a change but `changed`, and `device`, which is another number
        where a file system was mounted again."""
        return replace(self, device=0, changed=0) == replace(other, device=0, changed=0)


class HashCache:
    """SHA-256 sums of files on this machine that have not changed since they were hashed.

    A file is known by its real path, inode, size, modification time and change time. Without the
    last one, a file that is written in place and given its old time stamp back would pass for the
    old one. A build moves the change time itself, where it hard-links weights into the bundle and
    unlinks those of the bundle that it replaces. So the files that one object has hashed are
    followed: `link` takes over the change time that its own link has made, `changed` reads a file
    again where anything else has moved it, and `renew` writes down what it is after all links. A
    change between the last two is known to nobody but the next `verify`: so little may happen
    between them.

    Stamps come from a clock that ticks: a file that is changed twice within a tick looks the same.
    So a sum is kept only of a file that has not been modified for a while, and after a tick without
    change. The cache only saves time: one that cannot be read or written, or that others could have
    written, is ignored.
    """

    _MARGIN_NS = 2_000_000_000
    """A file this fresh may be modified again without a new time stamp (FAT's are 2 s apart)."""

    _TICK_S = 0.02
    """Longer than the clock of change times takes from one stamp to the next: 10 ms at 100 Hz."""

    _MAX_ENTRIES = 4096

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` is where the cache lies; the user's cache folder where it is not given."""
        self._file = CacheFile((folder or user_cache()) / "hashes.json", self._MAX_ENTRIES)
        # What this object has hashed, by the path that it was given.
        self._hashed: dict[Path, tuple[FileIdentity, str]] = {}

    def hash_files(
        self, paths: Iterable[str | os.PathLike[str]], on_bytes: OnBytes | None = None
    ) -> dict[Path, str]:
        """As the function `hash_files`; a known file counts as read in one go."""
        known = {path: e for path, e in self._file.load().items() if _is_entry(e)}
        result: dict[Path, str] = {}
        before: dict[Path, FileIdentity] = {}
        for path in dict.fromkeys(Path(path) for path in paths):
            with disk_errors("read", path):
                before[path] = FileIdentity.of(path)
            entry = known.get(os.path.realpath(path))
            if entry is not None and entry[:-1] == _stamps(before[path]):
                result[path] = str(entry[-1])
                if on_bytes is not None:
                    on_bytes(before[path].size)
        missing = [path for path in before if path not in result]
        started = time.time_ns()
        result.update(hash_files(missing, on_bytes))
        self._hashed |= {path: (identity, result[path]) for path, identity in before.items()}
        self._learn(path for path in missing if before[path].modified < started - self._MARGIN_NS)
        return {path: result[path] for path in before}

    def link(
        self,
        source: str | os.PathLike[str],
        destination: str | os.PathLike[str],
        on_bytes: OnBytes | None = None,
    ) -> Literal["linked", "copied"]:
        """As `link_or_copy`. A file that was hashed, under this name or another, stays known."""
        with disk_errors("read", source):
            before = FileIdentity.of(source)
            how = link_or_copy(source, destination, on_bytes)
            after = FileIdentity.of(source)
        for path, (identity, digest) in self._hashed.items():
            if identity == before and after.may_equal(before):
                self._hashed[path] = after, digest
        return how

    def changed(self, on_bytes: OnBytes | None = None) -> list[Path]:
        """The hashed files that hold other bytes now, or are gone.

        A file with another identity is read again; `on_bytes` hears of that.
        """
        found = []
        for path, (identity, digest) in self._hashed.items():
            try:
                now = FileIdentity.of(path)
                same = now == identity or (
                    now.size == identity.size and sha256_file(path, on_bytes) == digest
                )
            except OSError:
                same = False
            if same:
                self._hashed[path] = now, digest
            else:
                found.append(path)
        return found

    def renew(self) -> None:
        """Keep the sums of the hashed files, whose change times links have moved since."""
        for path, (identity, digest) in list(self._hashed.items()):
            try:
                now = FileIdentity.of(path)
            except OSError:
                continue
            if now.may_equal(identity):
                self._hashed[path] = now, digest
        oldest = time.time_ns() - self._MARGIN_NS
        self._learn(path for path, (known, _) in self._hashed.items() if known.modified < oldest)

    def _learn(self, paths: Iterable[Path]) -> None:
        """Write down the sums of hashed files, unless they change within a tick of the clock."""
        wanted = list(paths)
        if not wanted:
            return
        newest = max(self._hashed[path][0].changed for path in wanted)
        wait = self._TICK_S - (time.time_ns() - newest) / 1e9
        if wait > 0:
            time.sleep(min(wait, self._TICK_S))
        learned: dict[str, list[int | str]] = {}
        for path in wanted:
            identity, digest = self._hashed[path]
            if _unchanged(path, identity):
                learned[os.path.realpath(path)] = [*_stamps(identity), digest]
        if learned:
            self._file.add(learned)


class CacheFile:
    """A JSON object in the user's cache, of which the newest `most` entries are kept.

    It only saves time: where it cannot be read or written, or others could have written it, it is
    empty.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._path = path
        self._most = most

    def load(self) -> dict[str, Any]:
        """The entries. What they are is for the caller to check."""
        if not is_private(self._path.parent):
            return {}
        try:
            entries = json.loads(read_whole(self._path, _MAX_CACHE).decode("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}

    def add(self, learned: Mapping[str, object]) -> None:
        """Write entries down, in place of those of the same name."""
        # Read again: another process may have learned something since.
        entries = self.load()
        for name, entry in learned.items():
            entries.pop(name, None)
            entries[name] = entry
        newest = dict(list(entries.items())[-self._most :])
        folder = self._path.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_private(folder) and folder.stat().st_uid == os.geteuid():
                os.chmod(folder, 0o700)  # what others wrote there was not loaded
            if is_private(folder):
                write_atomic(self._path, json.dumps(newest))
        except (OSError, BundleError):
            pass


def is_private(folder: Path) -> bool:
    """Whether nobody but this user, or root, can write into a folder, or there is none yet."""
    try:
        status = os.stat(folder)
    except OSError:
        return True
    return owner_problem(status) is None


def owner_problem(status: os.stat_result) -> str | None:
    """Why others than this user and root could write a file or folder, None where none can."""
    if os.name != "posix":  # elsewhere the bits do not tell
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to another user (number {status.st_uid})"
    others = status.st_mode & stat.S_IWOTH
    if others or (status.st_mode & stat.S_IWGRP and not _is_private_group(status)):
        return f"can be written by others (its mode is {stat.S_IMODE(status.st_mode):o})"
    return None


def _is_private_group(status: os.stat_result) -> bool:
    """Whether a file's group is the one that its owner has alone.

    Debian and others give each user such a group, and a mask that lets it write.
    """
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:  # unknown here, as in many containers
        return False
    own = group.gr_gid == owner.pw_gid and group.gr_name == owner.pw_name
    return own and set(group.gr_mem) <= {owner.pw_name}


def user_cache() -> Path:
    """The user's folder for what only saves time."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    root = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    return Path(root) / "fluxdeploy"


def _stamps(identity: FileIdentity) -> list[int]:
    """What an entry of the cache knows a file by; devices get other numbers when they are mounted
    again."""
    return [identity.inode, identity.size, identity.modified, identity.changed]


def _unchanged(path: Path, before: FileIdentity) -> bool:
    try:
        return FileIdentity.of(path) == before
    except OSError:
        return False


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 5
        and all(type(number) is int for number in entry[:-1])
        and isinstance(entry[-1], str)
        and re.fullmatch("[0-9a-f]{64}", entry[-1]) is not None
    )


def can_link(source: Path, folder: Path) -> bool:
    """Whether a hard link to a file from below `folder` can probably stand for a copy."""
    status = source.stat()
    # Linux lets others than the owner link a file only where they could write to it, and none of
    # them change its mode.
    own = os.name == "nt" or os.geteuid() in (0, status.st_uid)
    allowed = own or (os.access(source, os.W_OK) and not _lacking(status))
    return allowed and status.st_dev == folder.stat().st_dev


def _make_readable(path: Path, status: os.stat_result) -> None:
    """Let all read a file who may read one that is made now. Raises `OSError`."""
    if lacking := _lacking(status):
        os.chmod(path, stat.S_IMODE(status.st_mode) | lacking)


def _lacking(status: os.stat_result) -> int:
    """The bits of a mode that let read what is made now, and that a file has not."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o444 & ~mask & ~status.st_mode


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
        reader = open_regular(real)
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

    A file and its links have one mode, and libraries save weights as private files: a link makes
    the file as readable as what else is written here, and as a copy would be, within the user's
    mask. Symbolic links are followed first, since runtimes refuse those that leave a model's
    folder. An existing destination is replaced at once, never half. Missing folders are made.
    Raises `BundleError` where the source is no file or the disk refuses.
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
            os.link(real, temporary)
            _make_readable(temporary, status)
        except OSError:
            # Other file system, no links there, too many, not the owner: a copy always does,
            # and where it does not either, its error is the one to show.
            temporary.unlink(missing_ok=True)
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
        reader = open_regular(source)
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
