"""Latency on this machine: our bundles against PyTorch eager and torch.compile.

Two models. `demo:dev` from the start of the process to a saved picture, and FLUX.1's width and
heads at a reduced depth, with random weights and the smallest networks around the transformer, a
step at a time at each size. `fluxdeploy bench` does the timing: same weights, noise and threads for
everybody, pictures compared before anything is timed, a process for each contender, all of them in
turns.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from roofline import count_step, measure_peaks, roofline_shares

from exporters.synthetic.sparse_checkpoint import flux_of_depth, write_random_checkpoint
from fluxdeploy.bench.choose import BenchRequest, choose_contenders
from fluxdeploy.bench.measure import Counts, run_bench
from fluxdeploy.bench.report.plot import plot_bench
from fluxdeploy.bench.report.record import BenchReport, ContenderReport, to_json
from fluxdeploy.build.build import build
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress

BUNDLES = {
    "ours, fp32": ("fp32", "onnxruntime"),
    "ours, int8-dynamic": ("int8", "onnxruntime"),
    "fp32 on OpenVINO": ("fp32", "openvino"),
    "bf16 on OpenVINO": ("bf16", "openvino"),
    "int8 on OpenVINO": ("int8", "openvino"),
}
"""Names of bundles, with their precision and runtime."""

OPENVINO = ("fp32 on OpenVINO", "bf16 on OpenVINO", "openvino", "openvino-bf16")
"""What OpenVINO does by itself, with our graphs and with its own of diffusers' transformer."""

PEERS = ("eager", "eager-bf16", "compile", "compile-bf16", "openvino", "openvino-bf16")
CALIBRATION = "A red circle above a blue square\n"


@dataclass(frozen=True)
class Workload:
    """What is drawn: height and width in pixels, steps, pictures at once, CPU threads.

    None is the default.
    """

    size: tuple[int, int] | None = None
    steps: int | None = None
    batch: int = 1
    threads: int | None = None


@dataclass(frozen=True)
class Target:
    """What is asked of a ratio: the best of `ours` over the best of `peers`, at least `ratio`.

    It holds for the models whose names begin with `model`.
    """

    model: str
    quantity: str
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    ratio: float


TARGETS = (
    Target("width", "step", ("ours, fp32",), ("eager",), 3.0),
    Target("width", "step", tuple(BUNDLES), ("eager-bf16",), 1.8),
    Target("width", "step", tuple(BUNDLES), ("compile", "compile-bf16"), 1.3),
    Target("width", "step", tuple(BUNDLES), OPENVINO, 1.0),
    Target("demo", "picture", tuple(BUNDLES), ("eager",), 3.0),
    Target("demo", "cold start", tuple(BUNDLES), ("eager",), 5.0),
)


@click.command()
@click.option("--double-blocks", default=1, show_default=True)
@click.option("--single-blocks", default=2, show_default=True)
@click.option("--sizes", default="512", show_default=True, help="Sides, at full width.")
@click.option("--rounds", default=7, show_default=True, help="Half of them at full width.")
@click.option("--against", default=",".join(PEERS), show_default=True)
@click.option("--model", type=click.Choice(["demo", "width"]), help="Only one of the models.")
@click.option("--threads", type=int, help="Default: all cores.")
@click.option(
    "--one-by-one", is_flag=True, help="At full width, have one contender in memory at a time."
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep checkpoint and bundles here, and take over those that are there.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="Write this file; with one --model, what it holds of the other stays.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the demo model's parts.")
def main(
    double_blocks: int,
    single_blocks: int,
    sizes: str,
    rounds: int,
    against: str,
    model: str | None,
    threads: int | None,
    one_by_one: bool,
    folder: Path | None,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Build the bundles, time them against the peers, and hold the ratios against the targets."""
    peers = tuple(against.split(","))
    reports: dict[str, BenchReport] = {}
    with tempfile.TemporaryDirectory(prefix="latency-") as temporary, Progress() as progress:
        folder = folder or Path(temporary)
        if model in (None, "demo"):
            built = build_bundles(folder / "demo", "demo:dev", BUNDLES, progress)
            reports["demo"] = time_bundles(
                built,
                "demo:dev",
                peers,
                Workload(threads=threads),
                Counts(rounds, warmup=1, cold_starts=3),
                progress,
            )
        if model in (None, "width"):
            checkpoint = str(random_flux(folder, double_blocks, single_blocks, progress))
            place = folder / f"width-{double_blocks}-{single_blocks}"
            # Pictures of random weights say nothing, and take minutes at this width.
            built = build_bundles(place, checkpoint, BUNDLES, progress, Promise())
            for size in map(int, sizes.split(",")):
                reports[f"width-{size}"] = time_bundles(
                    built,
                    checkpoint,
                    peers,
                    Workload((size, size), 1, threads=threads),
                    Counts((rounds + 1) // 2, 1, cold_starts=0, one_by_one=one_by_one),
                    progress,
                )
    for name, report in reports.items():
        show(name, report)
    missed = check_targets(reports)
    if json_file is not None:
        known: dict[str, Any] = {}
        if model is not None and json_file.exists():
            known = json.loads(json_file.read_text(encoding="utf-8"))
        known |= record(reports, double_blocks, single_blocks)
        json_file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        plot_bench(reports["demo"], plot)
    raise SystemExit(1 if missed else 0)


def record(
    reports: Mapping[str, BenchReport], double_blocks: int, single_blocks: int
) -> dict[str, Any]:
    """The reports as they are written, those at full width with the share of the roofline."""
    peaks = measure_peaks("cpu")
    network = flux_of_depth(double_blocks, single_blocks).transformer
    written: dict[str, Any] = {}
    for name, report in reports.items():
        written[name] = json.loads(to_json(report))
        if name.startswith("width"):
            load = report.workload
            work = count_step(network, load.height * load.width // 256, load.tokens)
            written[name] |= {
                "double_blocks": double_blocks,
                "single_blocks": single_blocks,
                "work": vars(work),
                "peaks": vars(peaks),
                "share_of_roofline": roofline_shares(report, work, peaks),
            }
    return written


def random_flux(folder: Path, double_blocks: int, single_blocks: int, progress: Progress) -> Path:
    """The checkpoint of a depth below `folder`, written where it is not there yet."""
    checkpoint = folder / f"checkpoint-{double_blocks}-{single_blocks}"
    if not checkpoint.exists():
        task = progress.task("Writing random weights", total=1)
        unfinished = checkpoint.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_random_checkpoint(unfinished, flux_of_depth(double_blocks, single_blocks))
        unfinished.rename(checkpoint)
        task.advance()
    return checkpoint


def build_bundles(
    folder: Path,
    checkpoint: str,
    bundles: Mapping[str, tuple[str, str]],
    progress: Progress,
    promise: Promise | None = None,
) -> dict[str, Path]:
    """Bundles of a checkpoint in `folder`, by name, each of a precision for a runtime.

    What is there already is taken over. `promise` is that of pictures, the precision's by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompt = folder / "prompt.txt"
    prompt.write_text(CALIBRATION, encoding="utf-8")
    built = {}
    for name, (precision, runtime) in bundles.items():
        built[name] = folder / f"{runtime}-{precision}"
        static = PRECISIONS[precision].calibrated and runtime != "onnxruntime"
        calibration = prompt if static else None
        request = BuildRequest(
            checkpoint, precision, runtimes=(runtime,), calibration=calibration, promise=promise
        )
        build(request, built[name], progress)
    return built


def time_bundles(
    bundles: Mapping[str, Path],
    checkpoint: str,
    peers: Sequence[str],
    workload: Workload,
    counts: Counts,
    progress: Progress,
) -> BenchReport:
    """Time bundles, by their names, and peers. The first peer is the baseline, or the first bundle.

    Raises what `run_bench` does.
    """
    contenders, noise = choose_contenders(
        BenchRequest(
            bundles=tuple(bundles.values()),
            peers=tuple(peers),
            checkpoint=checkpoint,
            runtime="auto",
            size=workload.size,
            steps=workload.steps,
            batch=workload.batch,
            threads=workload.threads,
        ),
        progress,
    )
    names = [*bundles, *(each.name for each in contenders[len(bundles) :])]
    named = [replace(each, name=name) for each, name in zip(contenders, names, strict=True)]
    return run_bench(named, peers[0] if peers else names[0], noise, counts, progress)


def best(report: BenchReport, names: Iterable[str], quantity: str) -> ContenderReport | None:
    """The fastest of some contenders, None where none of them took part."""
    wanted = set(names)
    found = [c for c in report.contenders if c.name in wanted and quantity in c.timings]
    return min(found, key=lambda c: c.timings[quantity].p50, default=None)


def ratios(own: ContenderReport, other: ContenderReport, quantity: str) -> list[float]:
    """How many times faster `own` is, round by round."""
    rounds = (c.timings[quantity].rounds for c in (other, own))
    return [a / b for a, b in zip(*rounds, strict=True)]


def check_targets(reports: Mapping[str, BenchReport]) -> int:
    """Print every target with what came of it; returns how many were missed."""
    table = Table("", "", "target", "found", "", title="Targets")
    missed = 0
    pairs = [(n, r, t) for n, r in reports.items() for t in TARGETS if n.startswith(t.model)]
    for name, report, target in pairs:
        own = best(report, target.ours, target.quantity)
        peer = best(report, target.peers, target.quantity)
        if own is None or peer is None:
            continue
        found = ratios(own, peer, target.quantity)
        median = float(np.median(found))
        reached = median >= target.ratio
        missed += not reached
        table.add_row(
            name,
            f"{target.quantity}: {own.name} over {peer.name}",
            f"{target.ratio:g}",
            f"{median:.2f} ({min(found):.2f}-{max(found):.2f})",
            "" if reached else "missed",
        )
    Console().print(table)
    return missed


def show(name: str, report: BenchReport) -> None:
    """Print a model's table: medians in seconds, and the ratios to the baseline."""
    quantities = ("step", "picture", "cold start") if name == "demo" else ("step",)
    table = Table("", *quantities, "memory, MB", title=f"{name}: times faster than the first peer")
    for each in report.contenders:
        cells = []
        for quantity in quantities:
            timing = each.timings[quantity]
            ratio = "" if timing.ratio is None else f" ({timing.ratio.median:.2f}x)"
            cells.append(f"{timing.p50:.3f}{ratio}")
        memory = "" if each.memory is None else f"{each.memory / 1e6:.0f}"
        table.add_row(each.name, *cells, memory)
    Console().print(table)


if __name__ == "__main__":
    main()
