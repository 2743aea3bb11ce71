"""Whole folders: what is below one, locks that die with their process, and swaps in one step."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shlex
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from fluxdeploy.bundle.files import disk_errors, owner_problem
from fluxdeploy.errors import BundleError

__all__ = ["exchange", "files_below", "make_locked", "open_locked", "prune", "require_own"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _raise(error: OSError) -> NoReturn:
    raise error


def files_below(root: Path) -> Iterator[str]:
    """Everything below `root` that is not a folder, relative to it; links are not followed."""
    for folder, folders, files in os.walk(root, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in files + links:
            yield Path(folder, name).relative_to(root).as_posix()


def prune(root: Path, keep: Collection[str]) -> None:
    """Remove every file below `root` that is not in `keep`, and every folder left empty."""
    for path in list(files_below(root)):
        if path not in keep:
            os.unlink(root / path)
    for folder, folders, _ in os.walk(root, topdown=False, onerror=_raise):
        for name in folders:
            path_of_folder = os.path.join(folder, name)
            if not os.listdir(path_of_folder):
                os.rmdir(path_of_folder)


def require_own(folder: Path, status: os.stat_result) -> None:
    """Refuse a folder that others than this user and root can write, or a link in its place.

    What lies there is read, removed or put into the bundle: it must be what a build left there.
    `status` is that of the folder itself, and not of what a link leads to. Raises `BundleError`.
    """
    if stat.S_ISLNK(status.st_mode):
        raise BundleError(
            f"{folder} is a symbolic link, and a build works in a folder of its own there. Move "
            "the link away, or choose another folder."
        )
    if not stat.S_ISDIR(status.st_mode):
        raise BundleError(f"{folder} is a file, not a folder; choose another name.")
    problem = owner_problem(status)
    if problem is None:
        return
    if status.st_uid in (0, os.geteuid()):
        remedy = f"See what is in it, and run `chmod go-w {shlex.quote(str(folder))}`"
    else:
        remedy = "Build as that user"
    raise BundleError(
        f"{folder} {problem}, and so what a build puts there could be changed. {remedy}, or choose "
        "another folder."
    )


def make_locked(root: Path) -> int:
    """Make the folder `root` and lock it for this process; returns the lock's descriptor.

    Nobody else may write it, whatever the process's mask. The system drops the lock when the
    process ends, however it ends. Raises `BundleError` for a folder of others, see `require_own`.
    """
    while True:
        with disk_errors("make the folder", root):
            with suppress(FileExistsError):
                root.mkdir(mode=0o755)
            with suppress(FileNotFoundError):
                require_own(root, os.lstat(root))
            try:
                descriptor = open_locked(root, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue  # another build has just removed it
            except BlockingIOError:
                raise BundleError(
                    f"Another build is running in {root}. Wait until it ends, or choose another "
                    "folder."
                ) from None
            # Another build may have swapped this folder away while it was being locked.
            try:
                status = os.lstat(root)
                if os.path.samestat(os.fstat(descriptor), status):
                    require_own(root, status)
                    return descriptor
            except FileNotFoundError:
                pass
            except BundleError:
                os.close(descriptor)
                raise
            os.close(descriptor)


def open_locked(folder: Path, operation: int = fcntl.LOCK_EX) -> int:
    """Lock a folder for this process; returns the lock's descriptor, to be closed.

    Raises `BundleError` where the file system has no locks, `BlockingIOError` where `operation`
    says not to wait and another process holds it, and `OSError`.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as error:
        os.close(descriptor)
        raise BundleError(
            f"Cannot lock {folder}: its file system has no locks ({error.strerror}). Build on a "
            "local disk, and copy the bundle."
        ) from error
    return descriptor


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders' names in one step; False where the system or file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))
