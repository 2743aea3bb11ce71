"""All that can refuse a build before its work begins: `build` and `plan` ask the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines import Runtime, edition_runs_here, runs_here
from fluxdeploy.build.checkpoint import find_checkpoint
from fluxdeploy.build.editions import Layout, lay_out
from fluxdeploy.build.plan import Beside, Plan, make_plan
from fluxdeploy.build.resolve import BuildRequest, BuildSpec, resolve
from fluxdeploy.build.staging import check_destination
from fluxdeploy.errors import BundleError

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """A build that is settled: the editions to be made, a plan of each, and which the bundle has.

    Each plan counts what those before it write.
    """

    specs: tuple[BuildSpec, ...]
    plans: tuple[Plan, ...]
    layout: Layout


def prepare(
    request: BuildRequest,
    destination: Path,
    builders: Sequence[tuple[Runtime, tuple[str, ...]]],
) -> Prepared:
    """Settle a build at `destination` for runtimes and their targets, and plan it.

    Nothing is written.

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
    built = [runtime.name for runtime, _ in builders]
    layout = lay_out(request, checkpoint, built, destination)
    specs = tuple(
        resolve(request, checkpoint, runtime, targets, layout.edition(runtime.name))
        for runtime, targets in builders
    )
    if any(component.quantized for spec in specs for component in spec.components):
        from exporters.calibrate.find import open_calibration

        open_calibration(checkpoint, None, request.calibration)
    return Prepared(specs, _plan(specs, layout, destination), layout)


def _plan(specs: Sequence[BuildSpec], layout: Layout, destination: Path) -> tuple[Plan, ...]:
    kept = {Path(r.path).name for each in layout.kept for _, r in each.files()}
    held = {
        file
        for spec in specs
        for component in spec.components
        for file in component.export.linked
        if any(name == file.name or name.endswith(f".{file.name}") for name in kept)
    }
    running = any(edition_runs_here(each) for each in layout.kept) or any(
        runs_here(component.engines for component in spec.components) for spec in specs
    )
    plans: list[Plan] = []
    for spec in specs:
        taken = sum(plan.disk.needed for plan in plans)
        plans.append(make_plan(spec, destination, Beside(frozenset(held), taken, running)))
        held |= {file for component in spec.components for file in component.export.linked}
    return tuple(plans)


def _check_apart(checkpoint: Path, destination: Path) -> None:
    """Refuse to replace the checkpoint, or a folder around it, by the bundle."""
    if checkpoint.exists():
        source, target = (Path(os.path.realpath(path)) for path in (checkpoint, destination))
        if source == target or target in source.parents or source in target.parents:
            raise BundleError(
                f"The bundle {destination} and the checkpoint {checkpoint} overlap. "
                "Choose another --out."
            )
