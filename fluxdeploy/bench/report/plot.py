"""A benchmark's plot: how much faster, where the time goes, how steady it was, start and memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxdeploy.bench.report.record import BenchReport
from fluxdeploy.bench.report.tables import labels, make_tables
from fluxdeploy.bundle.files import write_atomic

__all__ = ["plot_bench"]

_LEGEND = {"frameon": False, "fontsize": "small"}


def plot_bench(report: BenchReport, path: Path) -> None:
    """Draw the report into a PNG, which is there whole or not at all.

    Raises `BundleError` where the disk refuses.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(report.contenders)
    rows: list[Any] = [["faster", "parts"], ["rounds", "rounds"], ["start", "memory"]]
    heights = [1.2 + 0.45 * count, 2.6, 1.0 + 0.4 * count]
    figure, axes = pyplot.subplot_mosaic(
        rows, figsize=(11, sum(heights) + 1), height_ratios=heights, layout="constrained"
    )
    names = list(labels(report).values())
    _plot_faster(axes["faster"], report, names)
    _plot_parts(axes["parts"], report, names)
    _plot_rounds(axes["rounds"], report, names)
    starts = [each.timings.get("cold start") for each in report.contenders]
    if any(starts):
        values = [0.0 if start is None else start.p50 for start in starts]
        _plot_bars(axes["start"], values, names, "cold start, seconds")
    else:
        _plot_bars(
            axes["start"],
            [each.load for each in report.contenders],
            names,
            "opening the model, seconds",
        )
    sizes = [(each.memory or 0) / 2**20 for each in report.contenders]
    _plot_bars(axes["memory"], sizes, names, "most memory, MiB")
    figure.suptitle(make_tables(report)[0].title)
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format="png")
    pyplot.close(figure)
    write_atomic(path, image.getvalue())


def _plot_faster(axes: Any, report: BenchReport, names: Sequence[str]) -> None:
    quantities = {"picture": ("whole picture", "tab:blue"), "step": ("a step", "lightsteelblue")}
    for row, (quantity, (words, colour)) in enumerate(quantities.items()):
        ratios = [each.timings[quantity].ratio for each in report.contenders]
        places = [index + 0.2 * (2 * row - 1) for index in range(len(names))]
        widths = [0.0 if ratio is None else ratio.median for ratio in ratios]
        ends = [
            [0.0 if r is None else r.median - r.low for r in ratios],
            [0.0 if r is None else r.high - r.median for r in ratios],
        ]
        axes.barh(places, widths, 0.38, xerr=ends, color=colour, capsize=2, label=words)
    noise = report.noise.get("picture")
    if noise is not None:
        axes.axvspan(min(noise.low, 1), max(noise.high, 1), color="gray", alpha=0.3, label="noise")
    axes.axvline(1, color="black", linewidth=0.8)
    _name_rows(axes, names)
    axes.set_xlabel(f"times faster than {labels(report)[report.baseline]}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, **_LEGEND)


def _plot_parts(axes: Any, report: BenchReport, names: Sequence[str]) -> None:
    parts = [each.parts(report.workload.steps) for each in report.contenders]
    left = [0.0] * len(parts)
    for word in dict.fromkeys(word for own in parts for word in own):
        widths = [own.get(word, 0.0) for own in parts]
        axes.barh(range(len(names)), widths, 0.6, left=left, label=word)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    _name_rows(axes, names)
    axes.set_xlabel("seconds of a picture")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, **_LEGEND)


def _plot_rounds(axes: Any, report: BenchReport, names: Sequence[str]) -> None:
    for name, each in zip(names, report.contenders, strict=True):
        rounds = each.timings["picture"].rounds
        axes.plot(range(1, len(rounds) + 1), rounds, marker="o", markersize=3, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("round")
    axes.set_ylabel("seconds of a picture")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, **_LEGEND)


def _plot_bars(axes: Any, values: Sequence[float], names: Sequence[str], words: str) -> None:
    bars = axes.barh(range(len(names)), values, 0.6, color="tab:blue")
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.margins(x=0.15)
    _name_rows(axes, names)
    axes.set_xlabel(words)


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
