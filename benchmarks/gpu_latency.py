"""Latency of a full-size transformer on this machine's GPU, and how far it is from the roofline.

Needs nothing but the machine: random weights of FLUX.1-dev's sizes are written here, 24 GB, with
the smallest networks around them. Every runtime that runs on the GPU gets bundles in every
precision that the GPU has; PyTorch eager and torch.compile in bfloat16 run beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from latency import Workload, build_bundles, random_flux, time_bundles
from rich.console import Console
from rich.table import Table
from roofline import count_step, measure_peaks, roofline_shares

from engines.registry import runtimes
from exporters.synthetic.sparse_checkpoint import FLUX_DEV, flux_of_depth
from fluxdeploy.bench.measure import Counts
from fluxdeploy.bench.report.record import BenchReport, to_json
from fluxdeploy.progress import Progress

PRECISIONS = {True: ("bf16", "fp16", "fp8", "fp4"), False: ("bf16", "fp16", "fp8-weights")}
"""By whether the runtime builds engines: FP8 and FP4 products are for those that do."""

PEERS = ("eager-bf16", "compile-bf16")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--size", "sizes", type=int, multiple=True, default=(512, 1024), show_default=True)
@click.option("--steps", default=4, show_default=True)
@click.option("--rounds", default=10, show_default=True)
@click.option("--one-by-one", is_flag=True, help="Have one contender on the GPU at a time.")
@click.option("--double-blocks", default=FLUX_DEV.transformer.double_blocks, show_default=True)
@click.option("--single-blocks", default=FLUX_DEV.transformer.single_blocks, show_default=True)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="Also write this file; of the same depth, what it holds of other sizes stays.",
)
def main(
    folder: Path,
    sizes: tuple[int, ...],
    steps: int,
    rounds: int,
    one_by_one: bool,
    double_blocks: int,
    single_blocks: int,
    json_file: Path | None,
) -> None:
    """Build bundles below FOLDER, which keeps them, and time a step of each at every size."""
    bundles = gpu_bundles()
    if not bundles:
        raise click.ClickException("No runtime can run engines on a GPU here: fluxdeploy doctor.")
    network = flux_of_depth(double_blocks, single_blocks)
    peaks = measure_peaks("cuda")
    depth = {"double_blocks": double_blocks, "single_blocks": single_blocks}
    written: dict[str, Any] = {}
    if json_file is not None and json_file.exists():
        written = json.loads(json_file.read_text(encoding="utf-8"))
    if {key: written.get(key) for key in depth} != depth:
        written = depth | {"sizes": {}}
    with Progress() as progress:
        checkpoint = str(random_flux(folder, double_blocks, single_blocks, progress))
        built = build_bundles(folder / "bundles", checkpoint, bundles, progress)
        for size in sizes:
            report = time_bundles(
                built,
                checkpoint,
                PEERS,
                Workload((size, size), steps),
                Counts(rounds, warmup=2, cold_starts=0, one_by_one=one_by_one),
                progress,
            )
            work = count_step(network.transformer, (size // 16) ** 2, report.workload.tokens)
            shares = roofline_shares(report, work, peaks)
            show(size, report, shares)
            written["sizes"][str(size)] = {
                "report": json.loads(to_json(report)),
                "work": vars(work),
                "peaks": vars(peaks),
                "share_of_roofline": shares,
            }
    if json_file is not None:
        json_file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def gpu_bundles() -> dict[str, tuple[str, str]]:
    """Names of the bundles that this machine's GPU can run, with precision and runtime."""
    found = {}
    for runtime in runtimes():
        target = next((t for t in runtime.targets if t != "cpu" and runtime.availability(t).ok), "")
        for precision in PRECISIONS[runtime.builds] if target else ():
            if runtime.precision_problem(target, precision) is None:
                found[f"{runtime.name}, {precision}"] = (precision, runtime.name)
    return found


def show(size: int, report: BenchReport, shares: dict[str, float]) -> None:
    """Print a table of one size."""
    table = Table("", "step, ms", "vs eager", "of roofline", "GPU, GB", title=f"{size}x{size}")
    for each in report.contenders:
        step = each.timings["step"]
        ratio = "" if step.ratio is None else f"{step.ratio.median:.2f}"
        share = f"{shares[each.name]:.0%}" if each.name in shares else ""
        memory = "" if each.gpu_memory is None else f"{each.gpu_memory / 1e9:.1f}"
        table.add_row(each.name, f"{1e3 * step.p50:.1f}", ratio, share, memory)
    Console().print(table)


if __name__ == "__main__":
    main()
