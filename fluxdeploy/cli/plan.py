"""`fluxdeploy plan`: what a build will take, before it begins."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.cli.options import (
    AS_JSON,
    BASE,
    CALIBRATION,
    CHECKPOINT,
    COMPONENT_PRECISION,
    CONTROLNETS,
    FOLDER,
    IMAGE_ENCODER,
    IP_ADAPTER,
    LORA_RANK,
    LORAS,
    MAX_BATCH,
    MAX_SIZE,
    MIN_SIZE,
    OPT_SIZE,
    PRECISION,
    QUALITY,
    REDUX,
    REPLACE,
    RUNTIMES,
    STRICT,
    TARGETS,
    TASK,
    WEIGHT_STREAMING,
    WORKSPACE,
    component_precisions,
)
from fluxdeploy.library_output import libraries_on_stderr
from fluxdeploy.lora import LoraFile
from fluxdeploy.terminal import say_json, show

if TYPE_CHECKING:
    from rich.table import Table

    from fluxdeploy.build.plan import Plan
    from fluxdeploy.build.prepare import Prepared
    from fluxdeploy.kernels import CallSizes


@click.command()
@CHECKPOINT
@BASE
@TASK
@PRECISION
@COMPONENT_PRECISION
@CALIBRATION
@LORAS
@LORA_RANK
@CONTROLNETS
@IP_ADAPTER
@IMAGE_ENCODER
@REDUX
@QUALITY
@STRICT
@RUNTIMES
@TARGETS
@MIN_SIZE
@OPT_SIZE
@MAX_SIZE
@MAX_BATCH
@WORKSPACE
@WEIGHT_STREAMING
@click.option(
    "--out",
    type=FOLDER,
    default="bundle",
    help="The bundle's folder, for the room on its disk.",
)
@REPLACE
@AS_JSON
def command(
    checkpoint: str | None,
    base: Path | None,
    task: str | None,
    precision: str,
    component_precision: tuple[str, ...],
    calibration: Path | None,
    loras: tuple[LoraFile, ...],
    lora_rank: int,
    controlnets: tuple[Path, ...],
    ip_adapter: Path | None,
    image_encoder: Path | None,
    redux: Path | None,
    quality: Promise | None,
    strict: bool,
    runtimes: tuple[str, ...],
    targets: tuple[str, ...],
    min_size: tuple[int, int] | None,
    opt_size: tuple[int, int] | None,
    max_size: tuple[int, int] | None,
    max_batch: int,
    workspace: int | None,
    weight_streaming: bool,
    out: Path,
    replace: bool,
    as_json: bool,
) -> None:
    """Tell what `build` will take, before any long work.

    With the options of `build`, and from the checkpoint's headers alone: the size of each
    component, disk and memory for the build, memory to make pictures at the usual and at the
    largest size, and what is impossible. Nothing is written. The exit code is not 0 where the build
    cannot be; `build` then refuses in the same words. No weight is read: that one is NaN shows when
    it is built. Memory of activations is an estimate.

    \b
    Examples:
      fluxdeploy plan
      fluxdeploy plan ./FLUX.1-dev --precision fp8 --runtime tensorrt-rtx --target sm89 --out rtx
      fluxdeploy plan ./FLUX.1-dev --max-size 2048x2048 --max-batch 4
      fluxdeploy plan --json | jq .disk
    """
    from engines import choose_runtime
    from fluxdeploy.build.prepare import prepare
    from fluxdeploy.build.resolve import BuildRequest
    from fluxdeploy.build.sizes import SizeRange

    request = BuildRequest(
        checkpoint,
        precision,
        component_precisions(component_precision),
        runtimes,
        targets,
        SizeRange(min_size, opt_size, max_size, max_batch),
        calibration,
        quality,
        strict,
        None if workspace is None else workspace * 2**20,
        weight_streaming,
        replace,
        loras,
        lora_rank,
        base,
        controlnets,
        ip_adapter,
        image_encoder,
        redux,
        task,
    )
    with libraries_on_stderr():
        ready = prepare(request, out, request.runtimes_by(choose_runtime))
    if as_json:
        first, *others = map(_report, ready.plans)
        say_json({**first, "editions": others, "kept": list(_kept(ready))}, indent=2)
    else:
        for number, plan in enumerate(ready.plans):
            if number:
                show("")
            _show(plan, out)
        for runtime in _kept(ready):
            show("", f"The {runtime} edition at {out} stays.")
    if any(plan.problems for plan in ready.plans):
        raise click.exceptions.Exit(1)


def _kept(ready: Prepared) -> tuple[str, ...]:
    return tuple(edition.runtime for edition in ready.layout.kept)


def _report(plan: Plan) -> dict[str, Any]:
    report = asdict(plan)
    report["disk"]["needed"] = plan.disk.needed
    report["problems"] = list(plan.problems)
    return report


def _show(plan: Plan, out: Path) -> None:
    show(*_tabulate_files(plan), "", *_tabulate_memory(plan), "", _tabulate_totals(plan, out))
    for style, mark, lines in (
        ("yellow", "Note", plan.warnings),
        ("red", "Cannot be built", plan.problems),
    ):
        for line in lines:
            show("", f"{mark}: {line}.", style=style)


def _tabulate_files(plan: Plan) -> tuple[Table, str]:
    """The table, and its legend."""
    engines = any(component.engine for component in plan.components)
    table = _make_table("On the disk, in MiB", ("component", "precision"))
    headings = {
        "parameters": "",
        "linked": "linked is what stays in the checkpoint's own files, and takes no room",
        "written": "written is what is converted or quantized into new files",
    }
    if engines:
        headings["engine"] = "engine is what the runtime makes of both"
    for heading in headings:
        table.add_column(heading, justify="right")
    for component in plan.components:
        precision = component.precision
        if component.compute != precision:
            precision += f" in {component.compute}"
        count = component.parameters
        number = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
        sizes = [component.linked, component.written, component.engine][: 3 if engines else 2]
        table.add_row(component.name, precision, number, *map(_mib, sizes))
    return table, f"{'; '.join(filter(None, headings.values()))}."


def _tabulate_memory(plan: Plan) -> tuple[Table, str]:
    """The table, and its legend."""
    place = "In memory" if plan.targets[0] == "cpu" else "On the GPU"
    table = _make_table(f"{place}, in MiB", ("component",))
    for heading in ("weights", "usual call", "largest call"):
        table.add_column(heading, justify="right")
    for component in plan.components:
        sizes = component.resident, component.activations, component.largest_activations
        table.add_row(component.name, *map(_mib, sizes))
    legend = (
        "A call takes its memory besides the weights. "
        f"Usual is {_describe_call(plan.usual)}; largest is {_describe_call(plan.largest)}."
    )
    return table, legend


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
            (disk.copied, "copied from the checkpoint, whose files cannot be linked"),
            (disk.engines, "engines"),
            (disk.other, "graphs, golden tensors, tokenizers"),
        )
        if size
    ]
    if disk.shared:
        parts.append(f"beside {_size(disk.shared)} of weights that another edition has too")
    table.add_row("disk", f"needs {_size(disk.needed)}; {_size(disk.free)} are free at {out}")
    table.add_row("", ", ".join(parts))
    most = max(phase.bytes for phase in plan.build)
    free = "unknown" if plan.free_memory is None else f"{_size(plan.free_memory)} are free"
    table.add_row("memory to build", f"needs {_size(most)}; {free}")
    for phase in plan.build:
        table.add_row("", f"{_size(phase.bytes)} for {phase.name} ({phase.component})")
    place = "memory to run" if plan.targets[0] == "cpu" else "GPU memory"
    for heading, call, run in (
        (place, "usual call", plan.run),
        ("", "largest call", plan.largest_run),
    ):
        low = f"{_size(run.low_vram)} with --low-vram"
        table.add_row(heading, f"{call}: {_size(run.all_open)}; {low}")
    return table


def _make_table(title: str, headings: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _describe_call(call: CallSizes) -> str:
    pictures = "a picture" if call.batch == 1 else f"{call.batch} pictures"
    return f"{pictures} of {call.image:,} image tokens with {call.text} text tokens"


def _mib(size: int) -> str:
    if not size:
        return "-"
    value = size / 2**20
    return f"{value:,.0f}" if value >= 100 else f"{max(value, 0.1):.1f}"


def _size(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
