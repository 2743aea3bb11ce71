"""`fluxdeploy plan`: what a build will take, before it begins."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxdeploy.cli.options import (
    COMPONENT_PRECISION,
    MAX_BATCH,
    MAX_SIZE,
    MIN_SIZE,
    OPT_SIZE,
    PRECISION,
    RUNTIME,
    TARGETS,
    component_precisions,
)
from fluxdeploy.library_output import libraries_on_stderr

if TYPE_CHECKING:
    from rich.table import Table

    from fluxdeploy.build.plan import ComponentPlan, Plan, RunMemory


@click.command()
@click.argument("checkpoint", required=False)
@PRECISION
@COMPONENT_PRECISION
@RUNTIME
@TARGETS
@MIN_SIZE
@OPT_SIZE
@MAX_SIZE
@MAX_BATCH
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="bundle",
    help="The bundle's folder, for the room on its disk.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    checkpoint: str | None,
    precision: str,
    component_precision: tuple[str, ...],
    runtime: str,
    targets: tuple[str, ...],
    min_size: tuple[int, int] | None,
    opt_size: tuple[int, int] | None,
    max_size: tuple[int, int] | None,
    max_batch: int,
    out: Path,
    as_json: bool,
) -> None:
    """Tell what `build` will take, before any long work.

    With the options of `build`, and from the checkpoint's headers alone: the size of each
    component, disk and memory for the build, memory to make pictures at the usual and at the
    largest size, and what is impossible. Nothing is written. The exit code is 1 where the build
    cannot be; `build` then refuses in the same words. Memory of activations is an estimate.

    \b
    Examples:
      fluxdeploy plan
      fluxdeploy plan ./FLUX.1-dev --precision fp8 --runtime tensorrt-rtx --target sm89
      fluxdeploy plan ./FLUX.1-dev --max-size 2048x2048 --max-batch 4
      fluxdeploy plan --json | jq .disk
    """
    from engines import choose_runtime
    from fluxdeploy.build.checkpoint import find_checkpoint
    from fluxdeploy.build.plan import make_plan
    from fluxdeploy.build.resolve import BuildRequest, resolve
    from fluxdeploy.build.sizes import SizeRange

    request = BuildRequest(
        checkpoint,
        precision,
        component_precisions(component_precision),
        runtime,
        targets,
        SizeRange(min_size, opt_size, max_size, max_batch),
    )
    chosen, devices = choose_runtime(runtime, targets, precision)
    with libraries_on_stderr():
        plan = make_plan(resolve(request, find_checkpoint(checkpoint), chosen, devices), out)
    if as_json:
        click.echo(json.dumps(_report(plan), indent=2))
    else:
        _show(plan, out)
    if plan.problems:
        raise click.exceptions.Exit(1)


def _report(plan: Plan) -> dict[str, Any]:
    report = asdict(plan)
    report["disk"]["needed"] = plan.disk.needed
    report["problems"] = list(plan.problems)
    return report


def _show(plan: Plan, out: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(_tabulate_components(plan))
    console.print()
    console.print(_tabulate_totals(plan, out))
    for style, mark, lines in (
        ("yellow", "Note", plan.warnings),
        ("red", "Cannot be built", plan.problems),
    ):
        for line in lines:
            console.print(f"\n{mark}: {line}.", style=style)


def _tabulate_components(plan: Plan) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    engines = any(component.engine for component in plan.components)
    for heading in ("component", "precision"):
        table.add_column(heading, overflow="fold")
    for heading in ("parameters", "linked", "written", *(("engine",) if engines else ())):
        table.add_column(heading, justify="right")
    for heading in ("weights in memory", "activations", "at most"):
        table.add_column(heading, justify="right")
    for component in plan.components:
        table.add_row(*_row(component, engines))
    return table


def _row(component: ComponentPlan, engines: bool) -> tuple[str, ...]:
    precision = component.precision
    if component.compute != precision:
        precision += f" in {component.compute}"
    sizes = [component.linked, component.written]
    if engines:
        sizes.append(component.engine)
    sizes += [component.resident, component.activations, component.largest_activations]
    count = component.parameters
    number = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    return (component.name, precision, number, *(_size(size) for size in sizes))


def _tabulate_totals(plan: Plan, out: Path) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("runtime", f"{plan.runtime} for {', '.join(plan.targets)}")
    disk = plan.disk
    parts = [
        f"{_size(size)} {what}"
        for size, what in (
            (disk.written, "weights"),
            (disk.copied, "copied from the checkpoint, whose disk is another"),
            (disk.engines, "engines"),
            (disk.other, "graphs, golden tensors, tokenizers"),
        )
        if size
    ]
    table.add_row("disk", f"{_size(disk.needed)} of {_size(disk.free)} free at {out}")
    table.add_row("", ", ".join(parts))
    free = "unknown" if plan.free_memory is None else _size(plan.free_memory)
    table.add_row("memory to build", f"{_size(max(p.bytes for p in plan.build))} of {free} free")
    table.add_row("", ", ".join(f"{p.name} {_size(p.bytes)} ({p.component})" for p in plan.build))
    place = "memory to run" if plan.targets[0] == "cpu" else "GPU memory"
    for heading, workload, run in (
        (place, plan.usual, plan.run),
        ("", plan.largest, plan.largest_run),
    ):
        pictures = "a picture" if workload.batch == 1 else f"{workload.batch} pictures"
        table.add_row(
            heading,
            f"{pictures} of {workload.image} image tokens, {workload.text} text tokens: "
            f"{_describe(run)}",
        )
    return table


def _describe(run: RunMemory) -> str:
    return f"{_size(run.all_open)}, {_size(run.low_vram)} with --low-vram"


def _size(size: int) -> str:
    value = float(size)
    if not size:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
