"""The first run on a GPU: what products, attention and other runtimes take at FLUX.1's sizes.

What kernels of our own have to beat, and whether Triton's linear is fast enough to build on. Needs
PyTorch and no network; Triton, cuDNN's front end (`nvidia-cudnn-frontend`) and diffusers are
measured where they are. Each stage is a process of its own with a time of its own, so that one
that hangs or breaks the GPU's context costs no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

__all__ = ["STAGES", "fastest", "rate", "run_stage", "table_of"]

WORKER = Path(__file__).with_name("gpu_kernels_worker.py")

STAGES = {
    "machine": 20,
    "peaks": 30,
    "products": 60,
    "attention": 45,
    "linears": 90,
    "specialized": 60,
    "norms": 20,
    "graphs": 20,
    "eager": 40,
    "compile": 80,
    "compile-cudnn": 80,
    "compile-fp8": 100,
}
"""What is measured, in this order, and the seconds that it may take at most."""

Found = dict[str, Any]


@click.command()
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write this file, anew with each result.",
)
@click.option("--seconds", default=350, show_default=True, help="Stop after this time.")
@click.option(
    "--stage", "stages", type=click.Choice(list(STAGES)), multiple=True, help="Default: all."
)
def main(json_file: Path | None, seconds: int, stages: Sequence[str]) -> None:
    """Measure all stages, or those that are named, and print a table."""
    if not has_gpu():
        raise click.ClickException(
            "PyTorch finds no NVIDIA GPU here, and nothing else is measured."
        )
    written: Found = {"results": [], "seconds": {}}
    console = Console()
    started = time.monotonic()
    for stage in stages or STAGES:
        begun = time.monotonic()
        limit = min(STAGES[stage], seconds - (begun - started))
        for found in run_stage([sys.executable, str(WORKER), stage], limit, stage):
            if "what" in found:
                written["results"].append({"stage": stage} | found)
            else:
                written |= found
            _save(json_file, written)
        written["seconds"][stage] = round(time.monotonic() - begun, 1)
        _save(json_file, written)
        console.print(f"{stage}: {written['seconds'][stage]:.0f} s", highlight=False)
    console.print_json(data=written.get("machine", {}))
    console.print(table_of(written["results"]))


def has_gpu() -> bool:
    """Whether PyTorch is here and can use an NVIDIA GPU."""
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is not None and torch.cuda.is_available()


def run_stage(command: Sequence[str], limit: float, stage: str) -> Iterator[Found]:
    """The lines of JSON that a process prints, each when it comes; at last, why it broke off."""
    if limit < 1:
        yield {"what": stage, "failure": "no time was left"}
        return
    stopped = threading.Event()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
    ):
        assert process.stdout is not None

        def stop() -> None:
            stopped.set()
            # With its children: torch.compile's workers would keep the pipe open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            for line in process.stdout:
                # Libraries print too, and a killed process leaves half a line.
                with contextlib.suppress(json.JSONDecodeError):
                    found = json.loads(line)
                    if isinstance(found, dict):
                        yield found
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                stop()
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    if stopped.is_set():
        yield {"what": stage, "failure": f"stopped after {limit:.0f} s"}
    elif code:
        last = said[-1] if said else "nothing"
        yield {"what": stage, "failure": f"ended with code {code}; its last words: {last}"[:300]}


def rate(found: Mapping[str, Any]) -> float | None:
    """Operations a second, or bytes where a copy was measured."""
    if found.get("milliseconds") is None or found.get("operations") is None:
        return None
    return float(1e3 * found["operations"] / found["milliseconds"])


def fastest(results: Iterable[Found]) -> list[Found]:
    """Of several ways to do one thing the fastest, or the first where all failed."""
    best: dict[tuple[str, ...], Found] = {}
    for found in results:
        key = (found["stage"], found.get("shape", ""), found["what"])
        time_of = [float(f.get("milliseconds") or "inf") for f in (found, best.get(key, {}))]
        if key not in best or time_of[0] < time_of[1]:
            best[key] = found
    return list(best.values())


def table_of(results: Sequence[Found]) -> Table:
    """A row for each thing that was done and each shape, the fastest way of it."""
    table = Table("", "shape", "fastest of", title="Medians")
    for heading in ("ms", "T/s", "error"):
        table.add_column(heading, justify="right")
    table.add_column("")
    stage = None
    for found in fastest(results):
        if found["stage"] != stage:
            stage = found["stage"]
            table.add_section()
        speed, error = rate(found), found.get("error")
        table.add_row(
            found["what"],
            found.get("shape", ""),
            found.get("variant", ""),
            "" if speed is None else f"{found['milliseconds']:.3f}",
            "" if speed is None else f"{speed / 1e12:.1f}",
            "" if error is None else f"{error:.1e}",
            found.get("failure") or "",
        )
    return table


def _save(file: Path | None, written: Found) -> None:
    if file is not None:
        file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
