"""Building a bundle so that nobody ever sees half of one.

A build works in `.<name>.building` beside the bundle `<name>`. Each finished artifact is recorded
there, so that a build that was cut off goes on where it stopped. At the end the whole folder is
swapped in, and an earlier bundle stays as it was until then. Nothing written holds a time, so the
result does not depend on how often the build was stopped.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from fluxdeploy.build.folders import (
    exchange,
    files_below,
    make_locked,
    open_locked,
    prune,
    require_own,
)
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.files import (
    disk_errors,
    hash_files,
    link_or_copy,
    read_whole,
    sync_file,
    sync_folder,
    write_atomic,
)
from fluxdeploy.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST, FileRecord, Manifest
from fluxdeploy.bundle.manifest_json import from_json, to_json
from fluxdeploy.bundle.paths import path_problem
from fluxdeploy.bundle.typed_json import load_strict, parse, to_plain
from fluxdeploy.errors import BundleError

__all__ = ["Staging", "check_destination", "find_manifest"]

OnBytes = Callable[[int], None]

_ARTIFACTS = ".artifacts"
_SCRATCH = ".scratch"


@dataclass(frozen=True)
class _Artifact:
    """What `.artifacts/<name>.json` holds: a finished artifact, and what it was made from."""

    key: str
    files: tuple[FileRecord, ...]


class Staging:
    """One build of the bundle at `destination`; a context manager.

    The caller writes files below `root` and calls `record` after each finished artifact, asks
    `finished` before it makes one, and ends with `commit`. A file below `root` that belongs to no
    recorded artifact is removed on entering: it may be half written, or share its bytes with an
    earlier bundle through a hard link, and must not be written to in place.

    Leaving without `commit` keeps the recorded artifacts for the next run. Raises `BundleError`
    where the destination must not be replaced, where a folder of the build belongs to another user
    or can be written by others, where another build is running there, or where the disk refuses.
    Folders around them are not looked at: one that others may write, and that has no sticky bit as
    /tmp has, lets them replace the whole bundle at any time.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str],
        put: Callable[[Path, Path], object] = link_or_copy,
    ) -> None:
        """A symbolic link is followed: the folder that it names is replaced, not the link.

        `put` makes a file of the earlier bundle available below `root`, as `link_or_copy` does.
        """
        with disk_errors("find", destination):
            self.destination = Path(os.path.realpath(destination))
        self._parent = self.destination.parent
        self.root = self._parent / f".{self.destination.name}.building"
        self._aside = self._parent / f".{self.destination.name}.previous"
        self._put = put
        self._lock: int | None = None
        self._artifacts: dict[str, _Artifact] = {}
        # Files below `root` that this process has hashed, or made and recorded.
        self._intact: dict[str, FileRecord] = {}
        self._earlier: Manifest | None = None

    def __enter__(self) -> Staging:
        _check_replaceable(self.destination)
        with disk_errors("make the folder", self._parent):
            self._parent.mkdir(parents=True, exist_ok=True)
        self._lock = make_locked(self.root)
        try:
            with disk_errors("prepare", self.root):
                self._recover()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None and not self._artifacts:
            shutil.rmtree(self.root, ignore_errors=True)  # nothing in it helps the next run
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _recover(self) -> None:
        """Tidy up after a build that was stopped at any moment, and find what it finished."""
        if os.path.lexists(self._aside):
            require_own(self._aside, os.lstat(self._aside))
            if (self.destination / MANIFEST_NAME).exists():
                shutil.rmtree(self._aside)
            else:
                os.rename(self._aside, self.destination)
        self._earlier = find_manifest(self.destination)
        self._artifacts = dict(self._read_artifacts())
        # A manifest is here where a build was stopped just before the swap, or just after it,
        # while it removed the earlier bundle. Either way its components can be used again.
        manifest = find_manifest(self.root)
        if manifest is not None:
            for name, component in manifest.stems().items():
                if name not in self._artifacts:
                    self._write_artifact(name, _Artifact(component.key, component.files))
        scratch = [path for path in files_below(self.root) if path.startswith(f"{_SCRATCH}/")]
        prune(self.root, {*self._artifact_files(), *self._artifact_records(), *scratch})

    def scratch(self, name: str) -> Path:
        """A file for what an artifact that is being made knows so far: kept from run to run, and
        removed by `commit`.
        """
        folder = self.root / _SCRATCH
        with disk_errors("make the folder", folder):
            folder.mkdir(exist_ok=True)
        return folder / name

    def _read_artifacts(self) -> Iterator[tuple[str, _Artifact]]:
        for path in sorted((self.root / _ARTIFACTS).glob("*.json")):
            try:
                artifact = parse(
                    _Artifact, load_strict(read_whole(path, MAX_MANIFEST).decode("utf-8"))
                )
            except (OSError, ValueError):
                continue
            if not any(path_problem(record.path) for record in artifact.files):
                yield unquote(path.stem), artifact

    def _artifact_files(self) -> dict[str, FileRecord]:
        return {
            record.path: record
            for artifact in self._artifacts.values()
            for record in artifact.files
        }

    def _artifact_records(self) -> list[str]:
        return [_artifact_path(name) for name in self._artifacts]

    def _write_artifact(self, name: str, artifact: _Artifact) -> None:
        path = self.root / _artifact_path(name)
        with disk_errors("write", path):
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(to_plain(artifact)))
        self._artifacts[name] = artifact

    def finished(
        self, name: str, key: str, on_bytes: OnBytes | None = None
    ) -> tuple[FileRecord, ...] | None:
        """The files of the artifact `name` where one made from the same `key` can be used again.

        It comes from an earlier build that was stopped, or is a component of the bundle that is
        being replaced, whose own files are called `name`; its files are then hard-linked below
        `root`. Every file's size and SHA-256 is checked once; `on_bytes` hears of the bytes hashed.
        None where the artifact must be made: its stale files are gone then.
        """
        artifact = self._artifacts.get(name)
        if artifact is not None:
            if artifact.key == key and self._verify(artifact.files, on_bytes):
                return artifact.files
            self._forget(name)
        component = self._earlier.stems().get(name) if self._earlier is not None else None
        if component is None or component.key != key:
            return None
        # Another artifact may hold newer bytes under the same name.
        held = self._artifact_files()
        if any(held.get(record.path, record) != record for record in component.files):
            return None
        missing = [r for r in component.files if self._intact.get(r.path) != r]
        if _first_broken(self.destination, missing, on_bytes) is not None:
            return None
        for record in missing:
            self._put(self.destination / record.path, self.root / record.path)
        self._sync(record.path for record in missing)
        self._intact.update((record.path, record) for record in missing)
        self._write_artifact(name, _Artifact(key, component.files))
        return component.files

    def keep(self, edition: Manifest, stems: Mapping[str, str]) -> None:
        """Take over all components of an edition of the bundle that is being replaced.

        `stems` says what their files are called. Raises `BundleError` where that bundle is broken.
        """
        for name, stem in stems.items():
            artifact, key = self._artifacts.get(stem), edition.components[name].key
            if artifact is not None and artifact.key != key:
                self._forget(stem)  # of a build that was to replace it, and was stopped
        for name, stem in stems.items():
            if self.finished(stem, edition.components[name].key) is None:
                raise BundleError(
                    f"The {edition.runtime} edition of {self.destination} cannot be kept, since "
                    f"files of its {name} are missing or changed: build it too, with --runtime "
                    f"{edition.runtime}, or leave it out, with --replace."
                )

    def holding(self, sha256: str, end: str) -> str | None:
        """The path of a recorded file with these bytes, whose name ends so; None without one."""
        return next(
            (
                path
                for path, record in self._artifact_files().items()
                if record.sha256 == sha256 and path.endswith(end)
            ),
            None,
        )

    def _verify(self, records: Iterable[FileRecord], on_bytes: OnBytes | None) -> bool:
        unknown = [record for record in records if self._intact.get(record.path) != record]
        if _first_broken(self.root, unknown, on_bytes) is not None:
            return False
        self._intact.update((record.path, record) for record in unknown)
        return True

    def _forget(self, name: str) -> None:
        artifact = self._artifacts.pop(name)
        with disk_errors("remove a part of", self.root):
            (self.root / _artifact_path(name)).unlink(missing_ok=True)
            held = self._artifact_files()
            for record in artifact.files:
                if record.path not in held:
                    self._intact.pop(record.path, None)
                    (self.root / record.path).unlink(missing_ok=True)

    def record(
        self,
        name: str,
        key: str,
        paths: Iterable[str | os.PathLike[str]],
        known: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> tuple[FileRecord, ...]:
        """Make sure that an artifact's files are on the disk, and remember that it is finished.

        `paths` are below `root`, absolute or relative to it. `known` gives the SHA-256 of files
        (by path relative to `root`) that need not be read again, `on_bytes` hears of the bytes
        hashed. Returns the files' records by path. Raises `BundleError` for a file that is not
        there, and `ValueError` for a path that is not below `root`.
        """
        relative = sorted({self._relative(path) for path in paths})
        sizes = {path: self._size(path) for path in relative}
        self._sync(relative)
        sums = {path: known[path] for path in relative if path in known} if known else {}
        unknown = {self.root / path: path for path in relative if path not in sums}
        for absolute, digest in hash_files(unknown, on_bytes).items():
            sums[unknown[absolute]] = digest
        records = tuple(FileRecord(path, sizes[path], sums[path]) for path in relative)
        self._write_artifact(name, _Artifact(key, records))
        self._intact.update((record.path, record) for record in records)
        return records

    def _relative(self, path: str | os.PathLike[str]) -> str:
        given = Path(path)
        relative = (given.relative_to(self.root) if given.is_absolute() else given).as_posix()
        problem = path_problem(relative)
        if problem is not None or relative.split("/")[0] in (_ARTIFACTS, _SCRATCH, MANIFEST_NAME):
            raise ValueError(f"the path {relative!r} {problem or 'is reserved'}")
        return relative

    def _size(self, path: str) -> int:
        try:
            status = os.lstat(self.root / path)
        except OSError:
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            raise BundleError(
                f"The bundle's file {path} was not written to {self.root}. Run the build again."
            )
        return status.st_size

    def _sync(self, paths: Iterable[str]) -> None:
        with disk_errors("write", self.root):
            folders = {self.root}
            for path in paths:
                sync_file(self.root / path)
                folders.update(self.root / folder for folder in Path(path).parents)
            for folder in folders:
                sync_folder(folder)

    def commit(self, manifest: Manifest, on_bytes: OnBytes | None = None) -> None:
        """Make `root`, with `manifest`, the bundle at the destination; this ends the build.

        Every file that the manifest names must be there with the recorded size; one that neither
        `record` nor `finished` returned is hashed too. All other files below `root` are removed.
        Then the bundle is opened where it lies: one that cannot be never replaces another. Raises
        `BundleError`, with the earlier bundle untouched.
        """
        text = to_json(manifest)
        from_json(text, f"The manifest for {self.destination}")
        records = {record.path: record for _, record in manifest.files()}
        self._check_whole(records.values(), on_bytes)
        _check_replaceable(self.destination)
        with disk_errors("write", self.root):
            prune(self.root, {*records, *self._artifact_records()})
        write_atomic(self.root / MANIFEST_NAME, text)
        open_bundle(self.root)
        # The records of artifacts outlive the writing of the manifest, which can stand in for them.
        with disk_errors("replace", self.destination):
            if self._artifacts:
                shutil.rmtree(self.root / _ARTIFACTS)
            sync_folder(self.root)
            self._swap()
        self._unlock()

    def _check_whole(self, records: Iterable[FileRecord], on_bytes: OnBytes | None) -> None:
        for record in records:
            size = self._size(record.path)
            if size != record.size:
                raise BundleError(
                    f"{self.root / record.path} has {size} bytes, and the manifest says "
                    f"{record.size}. Run the build again."
                )
        unknown = [record for record in records if self._intact.get(record.path) != record]
        broken = _first_broken(self.root, unknown, on_bytes)
        if broken is not None:
            raise BundleError(
                f"{self.root / broken} is not the file that the manifest describes. Run the build "
                "again."
            )
        self._sync(record.path for record in unknown)

    def _swap(self) -> None:
        """Give `root` the destination's name; what had it vanishes."""
        if not (self.destination / MANIFEST_NAME).exists():
            os.rename(self.root, self.destination)  # an empty folder may be in its place
            sync_folder(self._parent)
            return
        # Locked, so that a build that starts while it is removed does not take it for its own.
        earlier = open_locked(self.destination)
        try:
            if exchange(self.root, self.destination):
                leftover = self.root
            else:
                leftover = self._aside
                os.rename(self.destination, self._aside)
                try:
                    os.rename(self.root, self.destination)
                except OSError:
                    os.rename(self._aside, self.destination)
                    raise
            sync_folder(self._parent)
            # The new bundle is in place: what cannot be removed now is removed by the next build.
            shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(earlier)


def check_destination(destination: str | os.PathLike[str]) -> None:
    """Raise the `BundleError` that `Staging` would raise on entering; nothing is written."""
    staging = Staging(destination)
    _check_replaceable(staging.destination)
    parent = staging.destination.parent
    folder, made = parent, staging.root
    while not os.path.lexists(folder):
        folder, made = folder.parent, parent
    with disk_errors("make the folder", made):
        if not folder.is_dir():
            number = errno.EEXIST if folder == parent else errno.ENOTDIR
            raise OSError(number, os.strerror(number))
        with suppress(FileNotFoundError):
            os.lstat(made)  # the name may be too long
            return
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def _artifact_path(name: str) -> str:
    return f"{_ARTIFACTS}/{quote(name, safe='')}.json"


def _check_replaceable(destination: Path) -> None:
    """Raise `BundleError` where putting a bundle at `destination` would destroy something."""
    if Path(os.path.realpath(os.curdir)).is_relative_to(destination):
        raise BundleError(
            f"A bundle cannot replace the current folder {destination} or one that holds it; name "
            "a new folder, for example `bundle`."
        )
    if os.path.ismount(destination):
        raise BundleError(
            f"{destination} is a mount point and cannot be replaced; name a folder inside it."
        )
    if not os.path.lexists(destination):
        return
    with disk_errors("read", destination):
        require_own(destination, os.lstat(destination))
        files = set(files_below(destination))
    if files and MANIFEST_NAME not in files:
        raise BundleError(
            f"{destination} holds files and is not a bundle, so it is not replaced; choose a new "
            "or an empty folder."
        )
    manifest = find_manifest(destination)
    if manifest is not None:
        strangers = files - {MANIFEST_NAME} - {record.path for _, record in manifest.files()}
        if strangers:
            raise BundleError(
                f"{destination} holds files that are not the bundle's, such as {min(strangers)}, "
                "and replacing it would remove them; move them, or choose another folder."
            )


def find_manifest(root: Path) -> Manifest | None:
    """The manifest of the folder `root`, or None where there is none that can be read."""
    path = root / MANIFEST_NAME
    try:
        return from_json(read_whole(path, MAX_MANIFEST).decode("utf-8"), str(path))
    except (OSError, ValueError, BundleError):
        return None


def _first_broken(
    root: Path, records: Iterable[FileRecord], on_bytes: OnBytes | None
) -> str | None:
    """The path of a file that is not below `root` as recorded, or None where all are.

    A symbolic link is not what was recorded, wherever it leads. Raises `BundleError` for a file
    that cannot be read.
    """
    records = list(records)
    real = Path(os.path.realpath(root))
    for record in records:
        path = root / record.path
        if os.path.realpath(path) != str(real / record.path) or not path.is_file():
            return record.path
        if path.stat().st_size != record.size:
            return record.path
    sums = hash_files([root / record.path for record in records], on_bytes)
    return next((r.path for r in records if sums[root / r.path] != r.sha256), None)
