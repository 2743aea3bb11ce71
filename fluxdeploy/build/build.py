"""Building: a checkpoint becomes a bundle, artifact by artifact, each kept for a rerun."""

from __future__ import annotations

from pathlib import Path

from engines import choose_builder
from fluxdeploy.build.checkpoint import require_unchanged
from fluxdeploy.build.components import make_components
from fluxdeploy.build.describe import describe
from fluxdeploy.build.last import LastBuild
from fluxdeploy.build.prepare import prepare
from fluxdeploy.build.preview import fit_preview
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.build.run import BuildRun
from fluxdeploy.build.staging import Staging
from fluxdeploy.build.tokenizers import make_tokenizer
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.bundle.files import HashCache
from fluxdeploy.progress import Progress

__all__ = ["build"]


def build(request: BuildRequest, destination: Path, progress: Progress) -> Bundle:
    """Build a bundle at `destination`; an earlier one there stays usable until the end.

    A build that was cut off continues where it was: artifacts whose inputs have not changed are
    reused. Where all of it is there already, nothing is done. Raises the errors of each step;
    `destination` then is as it was before.
    """
    runtime, targets = choose_builder(
        request.runtime,
        request.targets,
        request.transformer_precision,
        request.component_precision,
    )
    last = LastBuild(request, destination, runtime, targets)
    unchanged = last.find()
    if unchanged is not None:
        for name in unchanged.manifest.components:
            progress.note(f"  {name}: unchanged")
        return unchanged
    spec, plan = prepare(request, destination, runtime, targets)
    plan.require_possible()
    for warning in plan.warnings:
        progress.note(f"{warning}.")
    cache = HashCache()
    with Staging(destination, cache.link) as staging:
        run = BuildRun(spec, staging, progress, cache)
        tokenizers = {name: make_tokenizer(name, run) for name in spec.tokenizers}
        components = make_components(run, "Exporting components")
        preview = fit_preview(run)
        require_unchanged(cache)
        staging.commit(describe(run, tokenizers, components, preview))
    cache.renew()
    bundle = open_bundle(destination)
    last.remember(bundle, run.hashes.files.keys())
    return bundle
