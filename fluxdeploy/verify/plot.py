"""The plot of a verification: how pictures and layers spread, and the thresholds that they have."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxdeploy.bundle.files import disk_errors
from fluxdeploy.errors import MissingDependencyError, UsageError
from fluxdeploy.install import install_command

if TYPE_CHECKING:
    from fluxdeploy.verify.layers import LayersReport
    from fluxdeploy.verify.pictures import PicturesReport
    from fluxdeploy.verify.verify import VerifyReport

__all__ = ["check_plot", "plot_quality"]

_PASSED, _FAILED, _GATE, _MEDIAN = "tab:blue", "tab:red", "tab:red", "black"
_NEXT_BLOCK = "lightsteelblue"
"""Every second block has this colour, so that its layers can be told from its neighbours'."""

_BINS = 20
_MAX_LABELS = 30
_LEGEND = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 3, "frameon": False}
"""Above the axes, where it hides nothing."""


def check_plot(path: Path) -> None:
    """Say what will keep a plot from being drawn, before the long work that leads to it.

    Raises `MissingDependencyError` without matplotlib, `UsageError` for a path that cannot be.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            f"--plot needs the package matplotlib: {install_command('dev')}."
        )
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--plot {path} cannot be written: give a file in a folder that exists.")


def plot_quality(report: VerifyReport, path: Path) -> None:
    """Draw PSNR and SSIM of the pictures, and the layers' SQNR where there are any, into a PNG.

    Raises `UsageError` for a report without pictures, `BundleError` where the disk refuses.
    """
    if report.pictures is None:
        raise UsageError("There are no pictures to plot. Give --checkpoint.")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = 1 if report.layers is None else 2
    figure = pyplot.figure(figsize=(10, 3.4 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    _plot_pictures(figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]), report.pictures)
    if report.layers is not None:
        _plot_layers(figure.add_subplot(grid[1, :]), report.layers)
    precision = {component.name: component.precision for component in report.components}
    emulated = " (emulated)" if "transformer" in report.emulated else ""
    figure.suptitle(f"{precision.get('transformer', '')}{emulated} against PyTorch float32")
    with disk_errors("write", path):
        figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)


def _plot_pictures(psnr_axes: Any, ssim_axes: Any, report: PicturesReport) -> None:
    values = [picture.psnr for picture in report.pictures]
    _histogram(psnr_axes, values, report.psnr, report.gate.min_psnr)
    psnr_axes.set_xlabel("PSNR in dB")
    count = len(report.pictures)
    psnr_axes.set_ylabel(f"of {count} pictures" if count > 1 else "one picture")
    values = [picture.ssim for picture in report.pictures]
    _histogram(ssim_axes, values, report.ssim, report.gate.min_ssim)
    ssim_axes.set_xlabel("SSIM")


def _histogram(axes: Any, values: Sequence[float], median: float, gate: float) -> None:
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        ends = (min(*finite, gate), max(*finite, gate))
        axes.hist(finite, bins=_BINS, range=ends, color=_PASSED)
    if len(finite) < len(values):
        axes.plot([], [], " ", label=f"{len(values) - len(finite)} without any difference")
    if math.isfinite(median):
        axes.axvline(median, color=_MEDIAN, linestyle="--", label=f"median {median:.3g}")
    axes.axvline(gate, color=_GATE, label=f"required of it {gate:g}")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.1)
    axes.legend(**_LEGEND)


def _plot_layers(axes: Any, report: LayersReport) -> None:
    top = max((ratio for ratio in report.sqnr.values() if math.isfinite(ratio)), default=1.0)
    heights = [min(max(ratio, 0.0), top) for ratio in report.sqnr.values()]
    gate = report.min_sqnr
    starts = _block_starts(report.sqnr)
    blocks = list(itertools.accumulate(number in starts for number in range(len(heights))))
    colours = [
        _FAILED if gate is not None and height < gate else (_PASSED, _NEXT_BLOCK)[1 - block % 2]
        for height, block in zip(heights, blocks, strict=True)
    ]
    axes.bar(range(len(heights)), heights, width=0.8, color=colours)
    if gate is not None:
        axes.axhline(gate, color=_GATE, label=f"required {gate:g}")
        axes.legend(**_LEGEND)
    every = math.ceil(len(starts) / _MAX_LABELS)
    ticks = list(itertools.islice(starts.items(), 0, None, every))
    axes.set_xticks(
        [start for start, _ in ticks], [name for _, name in ticks], rotation=45, ha="right"
    )
    axes.set_xlim(-1, len(heights))
    axes.set_ylabel("SQNR in dB")
    axes.set_xlabel("quantized layers of the transformer, in its order")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _block_starts(layers: Mapping[str, float]) -> dict[int, str]:
    """The number of each block's first layer, and what the block is called on the axis."""
    starts: dict[int, str] = {}
    last = ""
    for number, layer in enumerate(layers):
        found = re.match(r"(single_)?transformer_blocks\.(\d+)\.", layer)
        name = layer if found is None else f"{'single' if found[1] else 'double'} {found[2]}"
        if name != last:
            starts[number] = last = name
    return starts
