"""A build under way: what its components are made with, and their calibration."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from fluxdeploy.build.checkpoint import hash_checkpoint
from fluxdeploy.build.keys import digest, sources_digest
from fluxdeploy.build.quality import require_nothing_spared
from fluxdeploy.build.resolve import BuildSpec
from fluxdeploy.build.staging import Staging
from fluxdeploy.bundle.files import HashCache
from fluxdeploy.bundle.manifest import FileRecord
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from exporters.calibrate.range_file import CalibrationFile

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
        cache.hash_files([lora.path for lora in spec.request.loras])
        self.weights = WeightFolder(staging.root / "onnx" / "weights", cache.link)

    @cached_property
    def calibration(self) -> tuple[CalibrationFile, FileRecord]:
        """What the quantized components need, read or measured, and its file in the bundle."""
        from exporters.calibrate.find import open_calibration
        from exporters.calibrate.range_file import read_calibration, write_calibration
        from exporters.quality.calibrate import calibrate

        # Of the base: ranges and recipes hold for all that is merged into it.
        checkpoint, known = self.spec.checkpoint.unmerged, self.hashes.digest
        request = self.spec.request
        source = open_calibration(checkpoint, known, request.calibration)
        path = self.staging.root / _CALIBRATION
        asked = [component.asked for component in self.spec.components if component.quantized]
        key = digest(
            {
                "checkpoint": known,
                "source": repr(source),
                "asked": [(a.component.name, a.precision, a.compute) for a in asked],
                "promise": repr(request.promise),
                "sources": sources_digest(),
            }
        )
        files = self.staging.finished(_CALIBRATION, key)
        if files is None:
            state = self.staging.scratch(_CALIBRATION)
            found = calibrate(
                checkpoint, known, source, asked, request.promise, state, self.progress
            )
            if request.strict:
                require_nothing_spared(found.recipes)
            write_calibration(found, path)
            files = self.staging.record(_CALIBRATION, key, [path])
        return read_calibration(path, checkpoint, known), files[0]
