"""A bundle: the folder that holds all that a deployment needs, described by its manifest."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from fluxdeploy.bundle.files import (
    SMALL,
    FileIdentity,
    disk_errors,
    hash_files,
    owner_problem,
    read_whole,
    sha256_file,
)
from fluxdeploy.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST, FileRecord, Manifest
from fluxdeploy.bundle.manifest_json import from_json
from fluxdeploy.bundle.paths import path_problem
from fluxdeploy.errors import BundleError

__all__ = ["Bundle", "open_bundle"]

_SWAPS = 3
"""How often a bundle may be replaced while it is opened."""

_REBUILD = "Build the bundle again with `fluxdeploy build`."


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `content_hash` is the SHA-256 of the manifest's bytes, as 64 hex digits.

    The manifest holds the hash of every file, so the content hash names the whole bundle. `seen`
    are the recorded files as they were when it was opened: what reads them later goes through
    `read` or `unchanged`, and so never gets those of another bundle that was put in its place.
    """

    root: Path
    manifest: Manifest
    content_hash: str
    seen: Mapping[str, FileIdentity] = field(default_factory=dict, repr=False, compare=False)

    @property
    def editions(self) -> tuple[Bundle, ...]:
        """One for each runtime that it is for, as if it had no other. Their files are here."""
        return tuple(replace(self, manifest=each) for each in self.manifest.each())

    def path(self, relative: str) -> Path:
        """Where the file that a manifest calls `relative` lies.

        Raises `BundleError` for a path that is not relative to the bundle or leaves it.
        """
        problem = path_problem(relative)
        if problem is not None:
            raise BundleError(f"{self.root} has no file {relative!r}: the path {problem}.")
        return self.root / relative

    def read(self, record: FileRecord) -> bytes:
        """The bytes of a recorded file, which are those that its SHA-256 is of.

        Raises `BundleError` for other bytes, and for a file of more than 64 MiB: weights are not
        read whole.
        """
        path = self.path(record.path)
        if record.size > SMALL:
            raise BundleError(
                f"{path} has {record.size} bytes, and a file of its kind has at most {SMALL}. "
                f"{_REBUILD}"
            )
        with self.unchanged([record]):
            with disk_errors("read", path):
                data = read_whole(path, SMALL)
            if hashlib.sha256(data).hexdigest() != record.sha256:
                raise self._another(path)
        return data

    @contextmanager
    def unchanged(self, records: Iterable[FileRecord]) -> Iterator[None]:
        """A block that reads files by their path, or lets a library do it.

        Raises `BundleError` where these files, or the manifest, are not the opened ones before the
        block or after it, also in place of what the block raises for want of them.
        """
        held = list(records)
        self._require_unchanged(held)
        try:
            yield
        except Exception:
            self._require_unchanged(held)
            raise
        self._require_unchanged(held)

    def _require_unchanged(self, records: Iterable[FileRecord]) -> None:
        if not self.seen:  # put together by hand: there is nothing to hold it against
            return
        if _manifest_hash(self.root) != self.content_hash:
            raise self._another(self.root / MANIFEST_NAME)
        for record in records:
            path = self.path(record.path)
            try:
                same = self._is_seen(record, path)
            except OSError:
                same = False
            if not same:
                raise self._another(path)

    def _is_seen(self, record: FileRecord, path: Path) -> bool:
        now, seen = FileIdentity.of(path), self.seen[record.path]
        if now == seen:
            return True
        # A build may have linked the file or put the same there again, or somebody has written it
        # and set its time back. Large files are not hashed on opening either.
        if record.size > SMALL:
            return now.may_equal(seen)
        return path.is_file() and now.size == record.size and sha256_file(path) == record.sha256

    def _another(self, path: Path) -> BundleError:
        return BundleError(
            f"The bundle {self.root} was replaced or changed since it was opened, since {path} is "
            "another file now; open it again."
        )


def open_bundle(
    path: str | os.PathLike[str],
    check: Literal["small", "all"] = "small",
    on_bytes: Callable[[int], None] | None = None,
) -> Bundle:
    """Read a bundle's manifest and check that its files are there, whole and inside it.

    Every file's size is checked, and its SHA-256 too where it has at most 64 MiB, or always with
    `check="all"`; `on_bytes` hears of the bytes hashed. A link in place of the folder is followed
    now and not later. Raises `BundleError`, naming the file.
    """
    if check not in ("small", "all"):
        raise ValueError(f"check is {check!r}; it must be 'small' or 'all'")
    root = Path(os.path.realpath(path))
    for _ in range(_SWAPS):
        data = _read_manifest(Path(path).absolute(), root)
        digest = hashlib.sha256(data).hexdigest()
        try:
            bundle = _open(root, data, digest, check, on_bytes)
        except BundleError:
            if _manifest_hash(root) == digest:
                raise
        else:
            if _manifest_hash(root) == digest:
                return bundle
        # A build has put another bundle there meanwhile.
    raise BundleError(f"The bundle {root} is replaced again and again; open it when that ends.")


def _open(
    root: Path,
    data: bytes,
    digest: str,
    check: Literal["small", "all"],
    on_bytes: Callable[[int], None] | None,
) -> Bundle:
    source = str(root / MANIFEST_NAME)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{source} is not UTF-8 text. {_REBUILD}") from error
    manifest = from_json(text, source)
    records = {record.path: record for _, record in manifest.files()}
    _check_inside(root, root / MANIFEST_NAME)
    seen = {record.path: _check_size(root, record) for record in records.values()}
    bundle = Bundle(root, manifest, digest, seen)
    hashed = [record for record in records.values() if check == "all" or record.size <= SMALL]
    sums = hash_files([bundle.path(record.path) for record in hashed], on_bytes)
    for record in hashed:
        if sums[bundle.path(record.path)] != record.sha256:
            raise BundleError(
                f"{bundle.path(record.path)} was changed: its SHA-256 is not the manifest's. "
                f"{_REBUILD}"
            )
    return bundle


def _manifest_hash(root: Path) -> str | None:
    """The SHA-256 of the manifest that lies at `root` now, None where there is none."""
    path = root / MANIFEST_NAME
    try:
        return hashlib.sha256(read_whole(path, MAX_MANIFEST)).hexdigest()
    except OSError:
        return None


def _read_manifest(given: Path, root: Path) -> bytes:
    with disk_errors("read", root / MANIFEST_NAME):
        try:
            return read_whole(root / MANIFEST_NAME, MAX_MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            pass
    previous = root.parent / f".{root.name}.previous"
    if not os.path.exists(root) and _is_own_folder(previous):
        raise BundleError(
            f"There is no bundle at {given}: a build was stopped while it replaced it. Run "
            f"`fluxdeploy build` again, or rename {previous} to {root}."
        )
    raise BundleError(
        f"There is no bundle at {given}: it has no {MANIFEST_NAME}. Make one with "
        "`fluxdeploy build`, or name another folder."
    )


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and owner_problem(path.stat()) is None


def _check_size(root: Path, record: FileRecord) -> FileIdentity:
    path = root / record.path
    _check_inside(root, path)
    if not path.is_file():
        raise BundleError(f"{path} is missing. {_REBUILD}")
    with disk_errors("read", path):
        identity = FileIdentity.of(path)
    if identity.size != record.size:
        raise BundleError(
            f"{path} has {identity.size} bytes, and the manifest says {record.size}. {_REBUILD}"
        )
    return identity


def _check_inside(root: Path, path: Path) -> None:
    """Refuse a file that lies elsewhere: runtimes read no weights from outside a graph's folder."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise BundleError(
            f"{path} is a link that leaves the bundle, to {real}, as in the cache of a hub. Copy "
            f"the files themselves, with `cp -rL {shlex.quote(str(root))} NEW_FOLDER` or with "
            "`hf download --local-dir NEW_FOLDER`, and open the copy."
        )
