"""A bundle: the folder that holds all that a deployment needs, described by its manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fluxdeploy.bundle.files import disk_errors, hash_files, read_whole
from fluxdeploy.bundle.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST,
    FileRecord,
    Manifest,
    from_json,
    path_problem,
)
from fluxdeploy.errors import BundleError

__all__ = ["Bundle", "open_bundle"]

_SMALL = 64 << 20
_REBUILD = "Build the bundle again with `fluxdeploy build`."


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `content_hash` is the SHA-256 of the manifest's bytes, as 64 hex digits.

    The manifest holds the hash of every file, so the content hash names the whole bundle.
    """

    root: Path
    manifest: Manifest
    content_hash: str

    def path(self, relative: str) -> Path:
        """Where the file that a manifest calls `relative` lies.

        Raises `BundleError` for a path that is not relative to the bundle or leaves it.
        """
        problem = path_problem(relative)
        if problem is not None:
            raise BundleError(f"{self.root} has no file {relative!r}: the path {problem}.")
        return self.root / relative


def open_bundle(
    path: str | os.PathLike[str],
    check: Literal["small", "all"] = "small",
    on_bytes: Callable[[int], None] | None = None,
) -> Bundle:
    """Read a bundle's manifest and check that its files are there, whole and inside it.

    Every file's size is checked, and its SHA-256 too where it has at most 64 MiB, or always with
    `check="all"`; `on_bytes` hears of the bytes hashed. Raises `BundleError`, naming the file.
    """
    if check not in ("small", "all"):
        raise ValueError(f"check is {check!r}; it must be 'small' or 'all'")
    root = Path(path).absolute()
    data = _read_manifest(root)
    source = str(root / MANIFEST_NAME)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{source} is not UTF-8 text. {_REBUILD}") from error
    bundle = Bundle(root, from_json(text, source), hashlib.sha256(data).hexdigest())
    records = {record.path: record for _, record in bundle.manifest.files()}
    real_root = os.path.realpath(root)
    for record in records.values():
        _check_size(bundle, record, real_root)
    hashed = [record for record in records.values() if check == "all" or record.size <= _SMALL]
    sums = hash_files([bundle.path(record.path) for record in hashed], on_bytes)
    for record in hashed:
        if sums[bundle.path(record.path)] != record.sha256:
            raise BundleError(
                f"{bundle.path(record.path)} was changed: its SHA-256 is not the manifest's. "
                f"{_REBUILD}"
            )
    return bundle


def _read_manifest(root: Path) -> bytes:
    with disk_errors("read", root / MANIFEST_NAME):
        try:
            return read_whole(root / MANIFEST_NAME, MAX_MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            pass
    real = Path(os.path.realpath(root))
    previous = real.parent / f".{real.name}.previous"
    if not os.path.exists(real) and os.path.isdir(previous):
        raise BundleError(
            f"There is no bundle at {root}: a build was stopped while it replaced it. Run "
            f"`fluxdeploy build` again, or rename {previous} to {real}."
        )
    raise BundleError(
        f"There is no bundle at {root}: it has no {MANIFEST_NAME}. Make one with "
        "`fluxdeploy build`, or name another folder."
    )


def _check_size(bundle: Bundle, record: FileRecord, real_root: str) -> None:
    path = bundle.path(record.path)
    real = os.path.realpath(path)
    if not Path(real).is_relative_to(real_root):
        raise BundleError(f"{path} is a link that leaves the bundle. {_REBUILD}")
    if not os.path.isfile(real):
        raise BundleError(f"{path} is missing. {_REBUILD}")
    size = os.path.getsize(real)
    if size != record.size:
        raise BundleError(
            f"{path} has {size} bytes, and the manifest says {record.size}. {_REBUILD}"
        )
