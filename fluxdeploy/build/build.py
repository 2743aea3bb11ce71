"""Building: a checkpoint becomes a bundle, artifact by artifact, each kept for a rerun."""

from __future__ import annotations

from pathlib import Path

from engines import choose_builder
from fluxdeploy.build.checkpoint import find_checkpoint, limits
from fluxdeploy.build.components import make_component
from fluxdeploy.build.describe import describe
from fluxdeploy.build.plan import make_plan
from fluxdeploy.build.resolve import BuildRequest, resolve
from fluxdeploy.build.run import BuildRun
from fluxdeploy.build.staging import Staging
from fluxdeploy.build.tokenizers import make_tokenizer
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.errors import BundleError
from fluxdeploy.progress import Progress

__all__ = ["build"]


def build(request: BuildRequest, destination: Path, progress: Progress) -> Bundle:
    """Build a bundle at `destination`; an earlier one there stays usable until the end.

    A build that was cut off continues where it was: artifacts whose inputs have not changed are
    reused. Raises the errors of each step; `destination` then is as it was before.
    """
    runtime, targets = choose_builder(request.runtime, request.targets, request.precision)
    if request.checkpoint is not None:
        _check_apart(Path(request.checkpoint), destination)
    checkpoint = find_checkpoint(request.checkpoint)
    spec = resolve(request, checkpoint, runtime, targets)
    plan = make_plan(spec, destination)
    plan.require_possible()
    for warning in plan.warnings:
        progress.note(f"{warning}.")
    limit = limits(checkpoint)
    if limit is not None:
        progress.note(f"{limit[0].upper()}{limit[1:]}.")
    with Staging(destination) as staging:
        run = BuildRun(spec, staging, progress)
        tokenizers = {name: make_tokenizer(name, run) for name in checkpoint.tokenizers}
        task = progress.task("Exporting components", total=len(spec.components))
        components = {}
        for component in spec.components:
            components[component.name] = make_component(component, run)
            task.advance()
        staging.commit(describe(run, tokenizers, components))
    return open_bundle(destination)


def _check_apart(checkpoint: Path, destination: Path) -> None:
    """Refuse to replace the checkpoint, or a folder around it, by the bundle."""
    if checkpoint.exists():
        source, target = checkpoint.resolve(), destination.resolve()
        if source == target or target in source.parents or source in target.parents:
            raise BundleError(
                f"The bundle {destination} and the checkpoint {checkpoint} overlap. "
                "Choose another --out."
            )
