"""Where a calibration comes from: a file of an earlier one, own prompts, or the usual prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from exporters.calibrate.range_file import CalibrationFile, read_calibration, read_prompts
from exporters.calibrate.trajectory import Calibration, default_calibration
from exporters.checkpoint import Checkpoint

__all__ = ["open_calibration"]


def open_calibration(
    checkpoint: Checkpoint, digest: str | None, given: Path | None
) -> CalibrationFile | Calibration:
    """What `--calibration` names: what was measured (`.json`), or what to measure with.

    None is the default calibration. `digest` is the SHA-256 of the checkpoint, None where it is not
    known: the file may then be that of another one. Raises `ExportError` for a file that is broken
    or another checkpoint's, `UsageError` for a file without prompts.
    """
    if given is not None and given.suffix == ".json":
        return read_calibration(given, checkpoint, digest)
    calibration = default_calibration(checkpoint)
    return calibration if given is None else replace(calibration, prompts=read_prompts(given))
