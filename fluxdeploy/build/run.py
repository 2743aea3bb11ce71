"""A build under way: what its components are made with, and their calibration."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fluxdeploy.build.checkpoint import CheckpointHashes, calibration_digest, hash_checkpoint
from fluxdeploy.build.keys import digest, sources_digest
from fluxdeploy.build.quality import require_nothing_spared
from fluxdeploy.build.resolve import BuildSpec
from fluxdeploy.build.staging import Staging
from fluxdeploy.bundle.files import HashCache, disk_errors
from fluxdeploy.bundle.manifest import FileRecord, component_stem
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from exporters.calibrate.range_file import CalibrationFile
    from exporters.checkpoint import Checkpoint
    from exporters.weights.bind import WeightFolder

__all__ = ["BuildRun"]

_CALIBRATION = "calibration.json"
_TAKEN = "taken from an earlier bundle"


class BuildRun:
    """One run of a build: its staging folder, the checkpoint's hashes, and what components share.

    The checkpoint is hashed here, which may take a while; `cache` then follows its files.
    `earlier` is the folder of a bundle of the same that has other LoRAs: its graphs and its
    calibration are taken. `beside` is the run of another edition of the bundle: what it knows of
    the checkpoint, and has linked, is taken.
    """

    def __init__(
        self,
        spec: BuildSpec,
        staging: Staging,
        progress: Progress,
        cache: HashCache,
        earlier: Path | None = None,
        beside: BuildRun | None = None,
    ) -> None:
        from exporters.weights.bind import WeightFolder as Folder

        self.spec = spec
        self.staging = staging
        self.progress = progress
        self.earlier = earlier
        self.hashes: CheckpointHashes
        self.weights: WeightFolder
        if beside is not None:
            self.hashes, self.weights = beside.hashes, beside.weights
            return
        self.hashes = hash_checkpoint(spec.checkpoint, progress, cache)
        cache.hash_files([file for lora in spec.request.loras for file in lora.files])
        self.weights = Folder(
            staging.root / "onnx" / "weights", cache.link, _files_beside(spec.checkpoint)
        )

    @cached_property
    def calibration(self) -> tuple[CalibrationFile, FileRecord]:
        """What the quantized components need, read or measured, and its file in the bundle."""
        from exporters.calibrate.find import open_calibration
        from exporters.calibrate.range_file import read_calibration, write_calibration
        from exporters.quality.calibrate import calibrate

        if self.earlier is not None:
            return self._calibration_of(self.earlier)
        # Of the base: ranges and recipes hold for all that is merged into it.
        checkpoint, known = self.spec.checkpoint.unmerged, self._calibrated
        request = self.spec.request
        source = open_calibration(checkpoint, known, request.calibration)
        name = component_stem("calibration", self.spec.edition) + ".json"
        path = self.staging.root / name
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
        files = self.staging.finished(name, key)
        if files is None:
            state = self.staging.scratch(name)
            found = calibrate(
                checkpoint, known, source, asked, request.promise, state, self.progress
            )
            if request.strict:
                require_nothing_spared(found.recipes)
            write_calibration(found, path)
            files = self.staging.record(name, key, [path])
        return read_calibration(path, checkpoint, known), files[0]

    @property
    def _calibrated(self) -> str:
        """The digest of what is calibrated."""
        return calibration_digest(self.spec.checkpoint, self.hashes)

    def _calibration_of(self, earlier: Path) -> tuple[CalibrationFile, FileRecord]:
        from exporters.calibrate.range_file import read_calibration

        source, path = earlier / _CALIBRATION, self.staging.root / _CALIBRATION
        found = read_calibration(source, self.spec.checkpoint.unmerged, self._calibrated)
        files = self.staging.finished(_CALIBRATION, _TAKEN)
        if files is None or path.read_bytes() != source.read_bytes():
            with disk_errors("write", path):
                path.unlink(missing_ok=True)
                path.write_bytes(source.read_bytes())
            files = self.staging.record(_CALIBRATION, _TAKEN, [path])
        return found, files[0]


def _files_beside(checkpoint: Checkpoint) -> dict[Path, str]:
    """The weight files of parts that joined, by their real paths, with the first that has each."""
    found: dict[Path, str] = {}
    for part in checkpoint.parts_beside:
        for stored in checkpoint.parts[part].weights.values():
            found.setdefault(Path(os.path.realpath(stored.file)), part)
    return found
