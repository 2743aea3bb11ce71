"""A whole calibration: how large activations get, and the recipes of what is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from exporters.calibrate.range_file import CalibrationFile, read_calibration, write_calibration
from exporters.calibrate.ranges import ActivationRanges, measure_ranges
from exporters.calibrate.trajectory import Calibration, default_calibration
from exporters.checkpoint import Checkpoint
from exporters.quality.recipes import Asked, Found, find_recipes
from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.errors import ExportError
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress

__all__ = ["calibrate"]


def calibrate(
    checkpoint: Checkpoint,
    digest: str,
    source: CalibrationFile | Calibration,
    components: Sequence[Asked],
    promise: Promise | None,
    state: Path | None,
    progress: Progress,
) -> CalibrationFile:
    """Measure and find what the quantized components of a bundle need.

    What `source` has of it is taken over. `promise` is `find_recipes`'. `state` is the stem of
    files that keep what is known, for a build that is stopped.

    Raises what `measure_ranges` and `find_recipes` do.
    """
    given = source if isinstance(source, CalibrationFile) else None

    @cache
    def ranges() -> ActivationRanges:
        if given is not None and given.ranges is not None:
            return given.ranges
        wanted = source if isinstance(source, Calibration) else default_calibration(checkpoint)
        return _measure(checkpoint, digest, wanted, state, progress)

    needed = any(PRECISIONS[asked.precision].calibrated for asked in components)
    known = Found() if given is None else Found(given.recipes, given.means, given.moments)
    judged = find_recipes(checkpoint, components, ranges, promise, known, progress)
    smoothed = any(record.recipe.smoothed for record in judged.recipes.values())
    found = ranges() if needed or smoothed else None if given is None else given.ranges
    return CalibrationFile(digest, found, judged.recipes, judged.means, judged.moments)


def _measure(
    checkpoint: Checkpoint,
    digest: str,
    calibration: Calibration,
    state: Path | None,
    progress: Progress,
) -> ActivationRanges:
    """The ranges, of a build that was stopped after they were known if they are at hand."""
    if state is None:
        return measure_ranges(checkpoint, digest, calibration, None, progress)
    kept = state.with_suffix(".ranges")
    if kept.exists():
        try:
            ranges = read_calibration(kept, checkpoint, digest).ranges
        except ExportError:  # written by other code: it only saves time
            ranges = None
        if ranges is not None and ranges.calibration == calibration:
            return ranges
    ranges = measure_ranges(checkpoint, digest, calibration, state, progress)
    write_calibration(CalibrationFile(digest, ranges, {}), kept)
    return ranges
