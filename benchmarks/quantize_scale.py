"""Time and memory that it takes to quantize a full-size FLUX.1-dev, with a kill in the middle.

Writes the checkpoint as sparse files (real headers, no data on the disk), quantizes the conditioner
and the transformer in a process of its own with a calibration file, kills it without warning once
some weight files are whole, and starts it again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fluxdeploy.machine import describe_machine
from fluxdeploy.progress import Progress

WORKER = Path(__file__).with_name("quantize_worker.py")
PACKAGES = ("torch", "onnx", "onnx-ir", "numpy")
PRECISIONS = ("fp8", "int4-weights")
PEAK_BYTES = 2 * 10**9
"""What the process may hold at most."""

_KILL_AFTER = 8


@dataclass(frozen=True)
class Run:
    """One process: its weight files, those of them that an earlier run had made, and its costs.

    `rate` is bytes of whole files a second, hashing and syncing included and tracing left out.
    `peak_bytes` is None for a run that was killed.
    """

    files: int
    resumed: int
    seconds: float
    rate: float | None
    peak_bytes: int | None


@click.command()
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["fp8", "fp8-weights", "int8", "int4-weights"]),
    multiple=True,
    default=PRECISIONS,
    show_default=True,
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to work; 13 GB are written there.  [default: the system's temporary folder]",
)
def main(precisions: tuple[str, ...], json_file: Path | None, folder: Path | None) -> None:
    """Quantize a full-size FLUX.1-dev, kill the process, and go on.

    The weights are zeros that need no reading from the disk; what is written is real. Exits with 1
    where the peak of resident memory is past 2 GB or where the second run began again.
    """
    from full_size import write_full_size  # torch, which --help can do without

    machine = describe_machine(PACKAGES)
    place = Path(tempfile.mkdtemp(prefix="quantize-scale-", dir=folder))
    found: dict[str, dict[str, Any]] = {}
    try:
        with Progress() as progress:
            task = progress.task("Writing the checkpoint, sparse", total=1)
            write_full_size(place / "checkpoint", "diffusers")
            task.advance()
            for precision in precisions:
                killed = run(place, precision, _KILL_AFTER, progress)
                whole = run(place, precision, None, progress)
                weights = place / f".{precision}.building" / "onnx" / "weights"
                found[precision] = {
                    "bytes": sum(file.stat().st_size for file in weights.iterdir()),
                    "calibration_bytes": (place / f"{precision}.calibration.json").stat().st_size,
                    "killed": asdict(killed),
                    "resumed": asdict(whole),
                }
                shutil.rmtree(weights)
    finally:
        shutil.rmtree(place)
    report = {"machine": machine, "precisions": found}
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for precision, row in found.items():
        _tell(precision, row)


def _tell(precision: str, row: dict[str, Any]) -> None:
    killed, whole = row["killed"], row["resumed"]
    console = Console(highlight=False)
    console.print(f"{row['bytes'] / 1e9:.2f} GB of {precision} weights in {whole['files']} files")
    console.print(f"first run: killed after {killed['files']} files and {killed['seconds']:.1f} s")
    console.print(
        f"second run: {whole['resumed']} files were there, {whole['seconds']:.1f} s, "
        f"{whole['rate'] / 1e6:.0f} MB/s, peak {whole['peak_bytes'] / 1e6:.0f} MB"
    )
    if whole["peak_bytes"] >= PEAK_BYTES:
        raise click.ClickException("the peak of resident memory is past 2 GB.")
    if whole["resumed"] < killed["files"]:
        raise click.ClickException("the second run made files again that were whole.")


def run(place: Path, precision: str, kill_after: int | None, progress: Progress) -> Run:
    """Quantize in a fresh process; SIGKILL after that many weight files, if not None."""
    task = progress.task("Quantizing" if kill_after is None else "Quantizing, to be killed")
    command = [sys.executable, str(WORKER), str(place / "checkpoint"), str(place / precision)]
    started = time.perf_counter()
    files = resumed = written = 0
    busy = 0.0
    since = started
    peak: int | None = None
    with subprocess.Popen([*command, precision], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            now = time.perf_counter()
            peak = message.get("peak", peak)
            if "resumed" in message:
                # A component's files are all asked for before the first one is written.
                resumed += message["resumed"]
                since = now
            if "written" in message:
                files += 1
                written += message["written"]
                busy += now - since
                since = now
            if files == kill_after:
                process.kill()
                break
    if process.returncode and kill_after is None:
        raise click.ClickException(f"quantizing failed with exit code {process.returncode}.")
    task.finish()
    seconds = round(time.perf_counter() - started, 2)
    return Run(files + resumed, resumed, seconds, written / busy if files else None, peak)


if __name__ == "__main__":
    main()
