"""A build under way: what its components are made with, and their activation ranges."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from fluxdeploy.build.checkpoint import hash_checkpoint
from fluxdeploy.build.keys import digest, sources_digest
from fluxdeploy.build.resolve import BuildSpec
from fluxdeploy.build.staging import Staging
from fluxdeploy.bundle.files import HashCache
from fluxdeploy.bundle.manifest import FileRecord
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from exporters.calibrate.ranges import ActivationRanges

__all__ = ["BuildRun"]

_CALIBRATION = "calibration.json"


class BuildRun:
    """One run of a build: its staging folder, the checkpoint's hashes, and what components share.

    The checkpoint is hashed here, which may take a while; `cache` then follows its files.
    """

    def __init__(
        self, spec: BuildSpec, staging: Staging, progress: Progress, cache: HashCache
    ) -> None:
        from exporters.weights.bind import WeightFolder

        self.spec = spec
        self.staging = staging
        self.progress = progress
        self.hashes = hash_checkpoint(spec.checkpoint, progress, cache)
        self.weights = WeightFolder(staging.root / "onnx" / "weights", cache.link)

    @cached_property
    def ranges(self) -> tuple[ActivationRanges, FileRecord]:
        """The transformer's activation ranges, read or measured, and their file in the bundle."""
        from exporters.calibrate.find import find_ranges, open_calibration
        from exporters.calibrate.range_file import read_ranges, write_ranges

        checkpoint, known = self.spec.checkpoint, self.hashes.digest
        source = open_calibration(checkpoint, known, self.spec.request.calibration)
        path = self.staging.root / _CALIBRATION
        key = digest({"checkpoint": known, "source": repr(source), "sources": sources_digest()})
        files = self.staging.finished(_CALIBRATION, key)
        if files is None:
            state = self.staging.scratch(_CALIBRATION)
            write_ranges(find_ranges(source, checkpoint, known, state, self.progress), path)
            files = self.staging.record(_CALIBRATION, key, [path])
        return read_ranges(path, checkpoint, known), files[0]
