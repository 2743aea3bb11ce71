"""How a step's time grows with the picture, the batch and the depth, and a picture's with steps.

`demo:dev` for the first, second and last, and for the depth a network of FLUX.1's form with random
weights, all on ONNX Runtime.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import matplotlib.pyplot as plt
from latency import Workload, build_bundles, time_bundles
from rich.console import Console
from rich.table import Table

from exporters.synthetic.sparse_checkpoint import Sizes, flux_of_depth, write_random_checkpoint
from fluxdeploy.bench.measure import Counts
from fluxdeploy.bench.report.record import BenchReport
from fluxdeploy.machine import describe_machine
from fluxdeploy.progress import Progress

BUNDLES = {"fp32": ("fp32", "onnxruntime"), "int8-dynamic": ("int8", "onnxruntime")}
PACKAGES = ("numpy", "onnxruntime", "torch")

SIZES = (128, 192, 256, 384, 512)
BATCHES = (1, 2, 4, 8)
STEPS = (1, 4, 8, 16, 28)
DEPTHS = (1, 2, 4, 8)
"""Double blocks; there are twice as many single ones, as in FLUX.1."""

DEPTH_HEADS, DEPTH_SIZE = 4, 256


@dataclass(frozen=True)
class Axis:
    """What a curve goes over: its words, and the quantity whose time it shows."""

    label: str
    quantity: str


AXES = {
    "size": Axis("image tokens", "step"),
    "batch": Axis("pictures at once", "step"),
    "depth": Axis("blocks", "step"),
    "steps": Axis("steps", "picture"),
}


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw a PNG.")
def main(rounds: int, json_file: Path | None, plot: Path | None) -> None:
    """Build the bundles and time them along each axis."""
    counts = Counts(rounds, warmup=1, cold_starts=0)
    workloads = {
        "size": {(side // 16) ** 2: Workload((side, side), 2) for side in SIZES},
        "batch": {batch: Workload((128, 128), 2, batch) for batch in BATCHES},
        "steps": {steps: Workload((128, 128), steps) for steps in STEPS},
    }
    curves: dict[str, list[dict[str, Any]]] = {axis: [] for axis in AXES}
    with tempfile.TemporaryDirectory(prefix="cost-curves-") as place, Progress() as progress:
        built = build_bundles(Path(place) / "demo", "demo:dev", BUNDLES, progress)
        for axis, points in workloads.items():
            for value, workload in points.items():
                report = time_bundles(built, "demo:dev", (), workload, counts, progress)
                curves[axis] += rows(report, value)
        for depth in DEPTHS:
            folder = Path(place) / f"depth-{depth}"
            write_random_checkpoint(folder / "checkpoint", small_flux(depth))
            checkpoint = str(folder / "checkpoint")
            built = build_bundles(folder, checkpoint, BUNDLES, progress)
            workload = Workload((DEPTH_SIZE, DEPTH_SIZE), 2)
            report = time_bundles(built, checkpoint, (), workload, counts, progress)
            curves["depth"] += rows(report, 3 * depth)
    show(curves)
    result = {"machine": describe_machine(PACKAGES), "rounds": rounds, "curves": curves}
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        draw(curves, plot)


def small_flux(depth: int) -> Sizes:
    """FLUX.1's form with `depth` double and twice as many single blocks, and fewer heads."""
    sizes = flux_of_depth(depth, 2 * depth)
    width = DEPTH_HEADS * sizes.transformer.head_dim
    return replace(sizes, transformer=replace(sizes.transformer, width=width, mlp_width=4 * width))


def rows(report: BenchReport, value: int) -> list[dict[str, Any]]:
    """Each bundle's median seconds at one point of an axis."""
    return [
        {
            "bundle": each.name,
            "at": value,
            "seconds": {name: each.timings[name].p50 for name in ("step", "picture")},
        }
        for each in report.contenders
    ]


def show(curves: dict[str, list[dict[str, Any]]]) -> None:
    """Print all points."""
    table = Table("", "", "bundle", "a step, ms", "a picture, ms")
    for axis, points in curves.items():
        for point in points:
            seconds = (f"{1e3 * point['seconds'][name]:.1f}" for name in ("step", "picture"))
            table.add_row(AXES[axis].label, str(point["at"]), point["bundle"], *seconds)
    Console().print(table)


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot a panel for each axis."""
    figure, panels = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.2))
    for panel, (name, points) in zip(panels, curves.items(), strict=True):
        axis = AXES[name]
        for bundle in BUNDLES:
            own = [point for point in points if point["bundle"] == bundle]
            milliseconds = [1e3 * point["seconds"][axis.quantity] for point in own]
            panel.plot([point["at"] for point in own], milliseconds, "o-", label=bundle)
        panel.set(
            xlabel=axis.label, ylabel=f"ms for a {axis.quantity}", xlim=(0, None), ylim=(0, None)
        )
        panel.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
