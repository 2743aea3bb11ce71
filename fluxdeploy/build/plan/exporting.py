"""How an export gets its weights, and whether there is room for them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fluxdeploy.build.plan.footprint import weigh
from fluxdeploy.build.plan.objections import in_gib
from fluxdeploy.bundle.files import can_clone, can_link, clone
from fluxdeploy.errors import BundleError

if TYPE_CHECKING:
    from exporters.export import ExportSpec
    from exporters.weights.bind import WeightFolder

__all__ = ["place_weights"]


def place_weights(
    specs: Sequence[ExportSpec], out: Path, link: bool
) -> tuple[WeightFolder, list[ExportSpec]]:
    """The folder of an export's weights, and the exports as they are to be made.

    Other tools refuse files that have several names: a checkpoint's files are cloned where the
    file system has clones. Elsewhere a file can be many times larger than the part of it that a
    component needs, so that the tensors are copied. With `link` the files are hard links.

    Raises `BundleError` where the disk has too little room, or refuses.
    """
    from exporters.weights.bind import WeightFolder

    folder = WeightFolder(out / "weights")
    folder.make()
    sources = set().union(*(spec.linked for spec in specs))
    if not link and all(can_clone(source, folder.root) for source in sources):
        folder.put = clone
    elif not link:
        specs = [spec.copied() for spec in specs]
    needed = sum(weigh(spec).written for spec in specs)
    if link:
        needed += sum(s.stat().st_size for s in sources if not can_link(s, folder.root))
    free = shutil.disk_usage(folder.root).free
    if needed > free:
        raise BundleError(
            f"The export writes {in_gib(needed)} to the disk of {out}, and {in_gib(free)} are "
            "free: free some space, choose another --out, or fewer with --component."
        )
    return folder, list(specs)
