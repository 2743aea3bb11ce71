"""What a build leaves at its destination: the editions that it makes, and those that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxdeploy.build.describe import SOURCES, described_tasks, sources
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.build.run import BuildRun
from fluxdeploy.build.staging import find_manifest
from fluxdeploy.bundle.manifest import Manifest, component_stem, missing_component
from fluxdeploy.errors import BundleError

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

__all__ = ["Layout", "keep_editions", "lay_out"]

_HASHES = ("sha256", "image_encoder")


@dataclass(frozen=True)
class Layout:
    """The editions of a bundle that is to be built, by the names of their runtimes.

    order: all of them; files of all but the first have the runtime in their names. kept: those of
    the bundle at the destination that stay as they are.
    """

    order: tuple[str, ...]
    kept: tuple[Manifest, ...] = ()

    def edition(self, runtime: str) -> str:
        """What names the files of an edition: nothing for the first one."""
        return "" if runtime == self.order[0] else runtime


def lay_out(
    request: BuildRequest, checkpoint: Checkpoint, built: Sequence[str], destination: Path
) -> Layout:
    """Settle what becomes of the editions at `destination`, where those of `built` are made.

    Those of other runtimes stay where they are of the same checkpoint, with the same that joined
    it, and `replace` was not asked for. Which that is goes by names here, since no weight is read.
    Editions keep their places: those that are built again have nothing to do then.
    """
    earlier = None if request.replace else find_manifest(destination)
    if earlier is None or missing_component(earlier) or not _is_of(earlier, request, checkpoint):
        return Layout(tuple(built))
    editions = {each.runtime: each for each in earlier.each()}
    kept = tuple(each for name, each in editions.items() if name not in built)
    return Layout((*editions, *(name for name in built if name not in editions)), kept)


def _is_of(earlier: Manifest, request: BuildRequest, checkpoint: Checkpoint) -> bool:
    recorded = {key: earlier.provenance[key] for key in SOURCES if key in earlier.provenance}
    return earlier.tasks == described_tasks(checkpoint) and (
        _unhashed(recorded) == _unhashed(sources(checkpoint, request.checkpoint))
    )


def _unhashed(value: object) -> object:
    if isinstance(value, dict):
        return {name: _unhashed(each) for name, each in value.items() if name not in _HASHES}
    return [_unhashed(each) for each in value] if isinstance(value, list) else value


def keep_editions(layout: Layout, run: BuildRun) -> None:
    """Take the editions that stay into the staging folder of a run of the same bundle.

    Raises `BundleError` where the checkpoint, of which only the name was known, is another one by
    now, and where their files are broken.
    """
    now = sources(run.spec.checkpoint, run.spec.request.checkpoint, run.hashes)
    for kept in layout.kept:
        if any(kept.provenance.get(key) != now.get(key) for key in SOURCES):
            destination = run.staging.destination
            raise BundleError(
                f"The {kept.runtime} edition of {destination} was made from other weights than "
                "these, under the same name. Build it too, with --runtime "
                f"{kept.runtime}, leave it out, with --replace, or choose another --out."
            )
        edition = layout.edition(kept.runtime)
        run.staging.keep(kept, {n: component_stem(n, edition) for n in kept.components})
        run.progress.note(f"  {kept.runtime}: its edition stays")
