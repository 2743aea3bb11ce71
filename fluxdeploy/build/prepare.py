"""All that can refuse a build before its work begins: `build` and `plan` ask the same."""

from __future__ import annotations

import os
from pathlib import Path

from engines import Runtime
from fluxdeploy.build.checkpoint import find_checkpoint
from fluxdeploy.build.plan import Plan, make_plan
from fluxdeploy.build.resolve import BuildRequest, BuildSpec, resolve
from fluxdeploy.build.staging import check_destination
from fluxdeploy.errors import BundleError

__all__ = ["prepare"]


def prepare(
    request: BuildRequest, destination: Path, runtime: Runtime, targets: tuple[str, ...]
) -> tuple[BuildSpec, Plan]:
    """Settle a build at `destination`, and plan it. Nothing is written.

    What the plan says cannot be is for the caller to raise or to show. Everything else is raised
    here: a destination that cannot be replaced or written, a checkpoint, tokenizer or calibration
    that cannot be read, and what `resolve` raises. Weights are not read: NaN in them, and a
    calibration.json of another checkpoint, are found by the build alone.
    """
    named = [each for each in (request.checkpoint, request.base) if each is not None]
    for source in (*named, *request.paths_beside):
        _check_apart(Path(os.path.expanduser(source)), destination)
    check_destination(destination)
    checkpoint = find_checkpoint(
        request.checkpoint,
        request.loras,
        request.base,
        request.controlnets,
        request.ip_adapter,
        request.image_encoder,
        request.redux,
        request.task,
    )
    spec = resolve(request, checkpoint, runtime, targets)
    if any(component.quantized for component in spec.components):
        from exporters.calibrate.find import open_calibration

        open_calibration(checkpoint, None, request.calibration)
    return spec, make_plan(spec, destination)


def _check_apart(checkpoint: Path, destination: Path) -> None:
    """Refuse to replace the checkpoint, or a folder around it, by the bundle."""
    if checkpoint.exists():
        source, target = (Path(os.path.realpath(path)) for path in (checkpoint, destination))
        if source == target or target in source.parents or source in target.parents:
            raise BundleError(
                f"The bundle {destination} and the checkpoint {checkpoint} overlap. "
                "Choose another --out."
            )
