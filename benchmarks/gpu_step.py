"""A step of FLUX.1-dev's transformer at full width and depth: the native runtime beside PyTorch.

    python benchmarks/gpu_step.py FOLDER --json result.json

Weights are random; all contenders have the same ones and the same inputs, and are alone on the GPU
in a process of their own. Plans and kernels come from `flux_plan.py`, which needs no GPU and may
have written FOLDER on another machine. Nothing is printed of a contender whose GPU was slowed down
by heat.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from gpu_kernels import has_gpu, run_stage
from plan_files import PRECISIONS
from rich.console import Console
from rich.table import Table

WORKER = Path(__file__).with_name("gpu_step_worker.py")

CONTENDERS = {
    "weights": 90,
    "native-fp8": 45,
    "native-bf16": 60,
    "compile-blocks-cudnn": 70,
    "eager": 40,
    "compile-blocks-fp8-cudnn": 210,
    "compile-blocks": 70,
    "native-fp8-linears": 45,
    "compile": 180,
}
"""In this order, and the seconds that each may take at most."""

AT_ONE_SIZE = {"eager", "compile-blocks-fp8-cudnn", "compile-blocks", "compile"}
"""What is measured at the first size alone: PyTorch compiles for minutes."""

HEAT = 0x20 | 0x40
"""NVML's bits for a GPU that is slowed down by its own heat, or by its board's."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--double-blocks", default=19, show_default=True)
@click.option("--single-blocks", default=38, show_default=True)
@click.option("--size", "sizes", type=int, multiple=True, default=(1024, 512), show_default=True)
@click.option("--contender", "names", type=click.Choice(list(CONTENDERS)), multiple=True)
@click.option("--seconds", default=570, show_default=True, help="Stop after this time.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(
    folder: Path,
    double_blocks: int,
    single_blocks: int,
    sizes: tuple[int, ...],
    names: tuple[str, ...],
    seconds: int,
    json_file: Path | None,
) -> None:
    """Time a step of each contender at each size, and print a table."""
    if not has_gpu():
        raise click.ClickException("PyTorch finds no NVIDIA GPU here.")
    if not list(folder.glob("*.json")):
        from flux_plan import write_plan

        for precision in PRECISIONS:
            write_plan(folder, double_blocks, single_blocks, precision)
    commands = {
        name: [
            *(sys.executable, str(WORKER), name, str(folder)),
            *map(str, (double_blocks, single_blocks)),
            *map(str, sizes[:1] if name in AT_ONE_SIZE else sizes),
        ]
        for name in names or CONTENDERS
    }
    run_contenders(commands, CONTENDERS, seconds, json_file)


def run_contenders(
    commands: Mapping[str, Sequence[str]],
    limits: Mapping[str, int],
    seconds: int,
    json_file: Path | None,
) -> None:
    """Run the contenders one after the other, each as long as it may, and print a table."""
    started = time.monotonic()
    results: list[dict[str, Any]] = []
    for name, command in commands.items():
        limit = min(limits[name], seconds - (time.monotonic() - started))
        for found in run_stage(command, limit, name):
            results.append({"contender": name} | found)
            print(json.dumps(results[-1]), flush=True)
            if json_file is not None:
                json_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    Console(width=110).print(table_of(results))


def table_of(results: list[dict[str, Any]]) -> Table:
    """A row for each contender at each size, with its time as a ratio of eager's."""
    table = Table("", "size", title="A step")
    for heading in ("ms", "p90", "eager is", "error", "joules", "MHz", "GB"):
        table.add_column(heading, justify="right")
    eager = {
        r["size"]: r["step_ms"] for r in results if r.get("what") == "eager" and "step_ms" in r
    }
    for found in results:
        if "step_ms" not in found:
            if "failure" in found:
                table.add_row(found["contender"], "", found["failure"])
            continue
        if found["throttled"] & HEAT:
            table.add_row(found["what"], str(found["size"]), "slowed down by heat: not shown")
            continue
        base = eager.get(found["size"])
        table.add_row(
            found["what"],
            str(found["size"]),
            f"{found['step_ms']:.2f}",
            f"{found['p90_ms']:.2f}",
            "" if base is None else f"{base / found['step_ms']:.2f}x",
            f"{found['error']:.1e}",
            f"{found['joules']:.1f}",
            f"{found['clock_mhz']:.0f}",
            f"{found['memory'] / 1e9:.1f}",
        )
    return table


if __name__ == "__main__":
    main()
