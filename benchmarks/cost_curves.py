"""How the time of a step and of a picture grows with the picture, the batch and the steps.

Takes bundles that were built before. Those of one network at several depths, with names that tell
them, make the curve over depth.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from fluxdeploy.bench.contenders import BenchRequest, choose_contenders
from fluxdeploy.bench.measure import Counts, run_bench
from fluxdeploy.bench.report import BenchReport
from fluxdeploy.machine import describe_machine
from fluxdeploy.progress import Progress


@dataclass(frozen=True)
class Point:
    """What is drawn: pixels of a side, pictures in a call, steps."""

    size: int
    batch: int
    steps: int


@click.command()
@click.argument("bundles", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--sizes", default="128,192,256,384,512", show_default=True)
@click.option("--batches", default="1,2,4,8", show_default=True)
@click.option("--steps", "step_counts", default="1,2,4,8", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw a PNG.")
def main(
    bundles: tuple[Path, ...],
    sizes: str,
    batches: str,
    step_counts: str,
    rounds: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Time BUNDLES along each axis, with the smallest of the other two."""
    machine = describe_machine(["numpy"])
    axes = {"size": numbers(sizes), "batch": numbers(batches), "steps": numbers(step_counts)}
    least = {axis: min(values) for axis, values in axes.items()}
    curves: dict[str, list[dict[str, Any]]] = {}
    with Progress() as progress:
        for axis, values in axes.items():
            curves[axis] = []
            for value in values:
                report = measure(bundles, Point(**least | {axis: value}), rounds, progress)
                for each in report.contenders:
                    seconds = {q: each.timings[q].p50 for q in ("step", "picture", "host")}
                    curves[axis].append(
                        {"bundle": Path(each.name).name, axis: value, "seconds": seconds}
                    )
    result = {"machine": machine, "least": least, "rounds": rounds, "curves": curves}
    show(curves)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        draw(curves, plot)


def numbers(text: str) -> list[int]:
    """A list of numbers with commas, in order."""
    return sorted(int(part) for part in text.split(","))


def measure(
    bundles: tuple[Path, ...], point: Point, rounds: int, progress: Progress
) -> BenchReport:
    """Time one point for every bundle, in turns."""
    request = BenchRequest(
        bundles=bundles,
        peers=(),
        checkpoint=None,
        runtime="auto",
        size=(point.size, point.size),
        steps=point.steps,
        batch=point.batch,
        threads=None,
    )
    contenders, noise = choose_contenders(request, progress)
    return run_bench(contenders, contenders[0].name, noise, Counts(rounds, 1, 0), progress)


def show(curves: dict[str, list[dict[str, Any]]]) -> None:
    """Print all points."""
    table = Table("", "", "bundle", "step, s", "picture, s", "host, us")
    for axis, rows in curves.items():
        for row in rows:
            seconds = row["seconds"]
            table.add_row(
                axis,
                str(row[axis]),
                row["bundle"],
                f"{seconds['step']:.4f}",
                f"{seconds['picture']:.4f}",
                f"{1e6 * seconds['host']:.0f}",
            )
    Console().print(table)


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot each axis: a step's time, and for the steps a picture's."""
    figure, panels = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.2))
    for panel, (axis, rows) in zip(panels, curves.items(), strict=True):
        quantity = "picture" if axis == "steps" else "step"
        for bundle in dict.fromkeys(row["bundle"] for row in rows):
            own = [row for row in rows if row["bundle"] == bundle]
            places = [(row[axis] // 16) ** 2 if axis == "size" else row[axis] for row in own]
            panel.plot(places, [row["seconds"][quantity] for row in own], "o-", label=bundle)
        panel.set(
            xlabel={"size": "image tokens", "batch": "pictures in a call", "steps": "steps"}[axis],
            ylabel=f"seconds of a {quantity}",
            xlim=(0, None),
            ylim=(0, None),
        )
        panel.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
