"""A build that would make what is there already, recognised before a checkpoint is opened.

That takes PyTorch and transformers, whose import lasts longer than all that is left to do then.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from engines import Runtime
from fluxdeploy.build.keys import digest, sources_digest, tool_versions
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.bundle.files import SMALL, CacheFile, FileIdentity, user_cache
from fluxdeploy.demo import DEFAULT_CHECKPOINT, DEMO_CHECKPOINTS
from fluxdeploy.errors import BundleError

__all__ = ["LastBuild"]

_KEPT = 256
_MOST_FILES = 1000
"""Below a checkpoint's folder: where it lies among many other files, all is looked at anew."""

_MARGIN_NS = 2_000_000_000
"""A file this fresh may be modified again without a new time stamp."""

_TOKENIZERS = "tokenizers"

Identities = Mapping[str, FileIdentity]


class LastBuild:
    """What a build reads, and what is at its destination, as both are now.

    The user's cache holds, as one hash each, the states that builds have ended in. A state is the
    same where the request, the tools and all files below the checkpoint's folder are; these by
    inode, size and times, without being read. Checkpoints of a hub are not remembered.
    """

    def __init__(
        self,
        request: BuildRequest,
        destination: Path,
        builders: Sequence[tuple[Runtime, tuple[str, ...]]],
    ) -> None:
        self._request = request
        self._destination = Path(os.path.realpath(destination))
        self._builders = builders
        self._file = CacheFile(user_cache() / "builds.json", _KEPT)
        self._began = time.time_ns()
        self._read = self._look()

    def find(self) -> Bundle | None:
        """The bundle that the build would make, where it is at its destination, whole."""
        known = self._file.load()
        if self._read is None or not known:
            return None
        try:
            bundle = open_bundle(self._destination)
        except BundleError:
            return None
        return bundle if self._state(bundle, self._read) in known else None

    def remember(self, bundle: Bundle, followed: Collection[Path]) -> None:
        """Write down what a build ended in, unless what it has read was changed meanwhile.

        followed: the checkpoint's files, by their real paths, that the build has seen to itself:
        its hard links move their change times.
        """
        now = self._look()
        if self._read is None or now is None or self._read.keys() != now.keys():
            return
        for path, before in self._read.items():
            linked = Path(os.path.realpath(path)) in followed
            same = now[path].may_equal(before) if linked else now[path] == before
            if not same or before.modified > self._began - _MARGIN_NS:
                return
        # What is smaller is hashed by whoever opens the bundle.
        newest = max((i.modified for i in bundle.seen.values() if i.size > SMALL), default=0)
        state = self._state(bundle, now)
        if state is not None and newest < time.time_ns() - _MARGIN_NS:
            self._file.add({state: True})

    def _look(self) -> Identities | None:
        """Every file that the build may read, by its path; None where that is not known."""
        name = self._request.checkpoint or DEFAULT_CHECKPOINT
        path = Path(DEMO_CHECKPOINTS.get(name, os.path.expanduser(name)))
        if not path.exists():
            return None
        found = []
        if self._request.calibration is not None:
            found.append(os.path.realpath(self._request.calibration))
        found += [os.path.realpath(file) for lora in self._request.loras for file in lora.files]
        roots = [path if path.is_dir() else path.parent]
        roots += [each if each.is_dir() else each.parent for each in self._request.paths_beside]
        if self._request.base is not None:
            roots.append(self._request.base)
        folders = (
            each for root in roots for each in os.walk(os.path.realpath(root), followlinks=True)
        )
        for number, (folder, _, files) in enumerate(folders):
            found += [os.path.join(folder, file) for file in files]
            if number + len(found) > _MOST_FILES:
                return None
        try:
            return {file: FileIdentity.of(file) for file in found}
        except OSError:
            return None

    def _state(self, bundle: Bundle, read: Identities) -> str | None:
        """Of all that a bundle depends on, and the bundle itself; None without the tools."""
        try:
            tools = {**tool_versions(), _TOKENIZERS: importlib.metadata.version(_TOKENIZERS)}
        except importlib.metadata.PackageNotFoundError:
            return None
        return digest(
            {
                "request": repr(asdict(self._request)),
                "runtimes": self._versions(bundle.manifest.components),
                "tools": tools,
                "sources": sources_digest(),
                "read": _stamps(read),
                "bundle": bundle.content_hash,
                "files": _stamps(bundle.seen),
                "root": str(bundle.root),
            }
        )

    def _versions(self, components: Iterable[str]) -> list[list[str]]:
        """Of each component the runtime that a build would make its engines with."""
        found = (
            runtime.of(name, targets) for name in components for runtime, targets in self._builders
        )
        return [[runtime.name, runtime.version(), *targets] for runtime, targets in found]


def _stamps(identities: Identities) -> list[list[str | int]]:
    """Devices get other numbers when they are mounted again."""
    return [
        [path, known.inode, known.size, known.modified, known.changed]
        for path, known in sorted(identities.items())
    ]
