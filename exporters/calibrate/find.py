"""Where activation ranges come from: a file of earlier ones, own prompts, or the usual prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from exporters.calibrate.range_file import read_prompts, read_ranges
from exporters.calibrate.ranges import ActivationRanges, measure_ranges
from exporters.calibrate.trajectory import Calibration, default_calibration
from exporters.checkpoint import Checkpoint
from fluxdeploy.progress import Progress

__all__ = ["find_ranges", "open_calibration"]


def open_calibration(
    checkpoint: Checkpoint, digest: str | None, given: Path | None
) -> ActivationRanges | Calibration:
    """What `--calibration` names: ranges (`.json`), or a calibration with the prompts of a file.

    None is the default calibration. `digest` is the SHA-256 of the checkpoint, None where it is not
    known: ranges may then be those of another one. Raises `ExportError`
    for ranges that are broken or another checkpoint's, `UsageError` for a file without prompts.
    """
    if given is not None and given.suffix == ".json":
        return read_ranges(given, checkpoint, digest)
    calibration = default_calibration(checkpoint)
    return calibration if given is None else replace(calibration, prompts=read_prompts(given))


def find_ranges(
    source: ActivationRanges | Calibration,
    checkpoint: Checkpoint,
    digest: str,
    state: Path | None,
    progress: Progress,
) -> ActivationRanges:
    """The ranges themselves, measured where they are not known yet. See `measure_ranges`."""
    if isinstance(source, ActivationRanges):
        return source
    return measure_ranges(checkpoint, digest, source, state, progress)
