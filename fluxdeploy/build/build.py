"""Building: a checkpoint becomes a bundle, artifact by artifact, each kept for a rerun."""

from __future__ import annotations

from pathlib import Path

from engines import choose_builder
from fluxdeploy.build.checkpoint import require_unchanged
from fluxdeploy.build.components import make_components
from fluxdeploy.build.describe import describe
from fluxdeploy.build.editions import keep_editions
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

    It has an edition for each runtime. Those of other runtimes that the earlier one has stay too,
    where they are of the same checkpoint.

    A build that was cut off continues where it was: artifacts whose inputs have not changed are
    reused. Where all of it is there already, nothing is done. Raises the errors of each step;
    `destination` then is as it was before.
    """
    builders = request.runtimes_by(choose_builder)
    last = LastBuild(request, destination, builders)
    unchanged = last.find()
    if unchanged is not None:
        for stem in unchanged.manifest.stems():
            progress.note(f"  {stem}: unchanged")
        return unchanged
    ready = prepare(request, destination, builders)
    for plan in ready.plans:
        plan.require_possible()
    for warning in dict.fromkeys(warning for plan in ready.plans for warning in plan.warnings):
        progress.note(f"{warning}.")
    cache = HashCache()
    with Staging(destination, cache.link) as staging:
        run = BuildRun(ready.specs[0], staging, progress, cache)
        keep_editions(ready.layout, run)
        tokenizers = {name: make_tokenizer(name, run) for name in run.spec.tokenizers}
        editions = {kept.runtime: kept for kept in ready.layout.kept}
        preview = None
        for spec in ready.specs:
            if spec is not run.spec:
                run = BuildRun(spec, staging, progress, cache, beside=run)
            several = f" for {spec.runtime.name}" if len(ready.layout.order) > 1 else ""
            components = make_components(run, f"Exporting components{several}")
            preview = preview or fit_preview(run)
            editions[spec.runtime.name] = describe(run, tokenizers, components, preview)
        require_unchanged(cache)
        made = editions[spec.runtime.name]
        staging.commit(made.with_each([editions[name] for name in ready.layout.order]))
    cache.renew()
    bundle = open_bundle(destination)
    last.remember(bundle, run.hashes.files.keys())
    return bundle
