"""Time, memory and disk that it takes to export a full-size FLUX.1.

Writes checkpoints as sparse files (real headers, no data on the disk), and exports every component
of each in bfloat16 in a process of its own: FLUX.1-dev in the layouts of diffusers and of Black
Forest Labs, and with `--model` Fill, Kontext, and dev with a ControlNet.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import onnx
from rich.console import Console
from rich.table import Table

from fluxdeploy.machine import describe_machine
from fluxdeploy.progress import Progress

WORKER = Path(__file__).with_name("export_worker.py")
PRECISION = "bf16"
CASES = {
    "dev": ("diffusers", "bfl"),
    "fill": ("diffusers",),
    "kontext": ("diffusers",),
    "controlnet": ("diffusers",),
}
"""The kinds of checkpoints, and the layouts that each is measured in."""
PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


@dataclass(frozen=True)
class Targets:
    """What the export of a layout may take, at most."""

    seconds: float = 60.0
    peak_bytes: int = 10**9
    written_bytes: int = 64 * 10**6


TARGETS = Targets()


@dataclass(frozen=True)
class ComponentRow:
    """An exported component: its time, the nodes of its graph and the size of its ONNX file."""

    name: str
    seconds: float
    nodes: int
    onnx_bytes: int


@dataclass(frozen=True)
class Measurement:
    """The export of a checkpoint in a fresh process.

    `seconds` and `cpu_seconds` count from the start of the process to its end, imports included;
    `import_seconds` is the part of the imports. `written_bytes` is the room that new files take
    on the disk: hard links to the checkpoint take none.
    """

    model: str
    layout: str
    components: tuple[ComponentRow, ...]
    seconds: float
    cpu_seconds: float
    import_seconds: float
    peak_bytes: int
    weight_bytes: int
    written_bytes: int

    def missed(self) -> list[str]:
        """The targets that were missed, in words."""
        figures = (
            (self.seconds, TARGETS.seconds, f"took {self.seconds:.0f} s"),
            (self.peak_bytes, TARGETS.peak_bytes, f"held {_megabytes(self.peak_bytes)}"),
            (self.written_bytes, TARGETS.written_bytes, f"wrote {_megabytes(self.written_bytes)}"),
        )
        name = f"{self.model}, {self.layout},"
        return [f"{name} {words}" for value, limit, words in figures if value >= limit]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


@click.command()
@click.option(
    "--model",
    "models",
    type=click.Choice([*CASES]),
    multiple=True,
    default=("dev",),
    show_default=True,
    help="The kind of checkpoint. May be given several times.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to work; it must support sparse files.  [default: the system's temporary folder]",
)
@click.option("--keep", is_flag=True, help="Leave checkpoints and exports on the disk.")
def main(models: tuple[str, ...], json_file: Path | None, folder: Path | None, keep: bool) -> None:
    """Export full-size checkpoints of FLUX.1 in bf16 and measure it.

    A checkpoint is 34 GB of zeros that take no room on the disk. For each the targets are 60 s,
    1 GB of resident memory and 64 MB written; exits with 1 where one is missed.
    """
    from full_size import write_full_size  # torch, which --help can do without

    machine = describe_machine(PACKAGES)
    measurements = []
    with _workplace(folder, keep) as place, Progress() as progress:
        for model, layout in ((m, layout) for m in models for layout in CASES[m]):
            task = progress.task(f"Writing {model} in {layout} layout, sparse", total=1)
            checkpoint, output = place / f"{model}-{layout}", place / f"{model}-{layout}-onnx"
            write_full_size(checkpoint, layout, model)
            task.advance()
            measurements.append(measure(model, layout, checkpoint, output, progress))
    for measurement in measurements:
        show(measurement)
    if json_file is not None:
        report = {
            "machine": machine,
            "targets": asdict(TARGETS),
            "layouts": [asdict(measurement) for measurement in measurements],
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    missed = [words for measurement in measurements for words in measurement.missed()]
    if missed:
        raise click.ClickException(f"past the target: {'; '.join(missed)}")


@contextmanager
def _workplace(folder: Path | None, keep: bool) -> Iterator[Path]:
    """A folder of its own below `folder`, removed at the end unless it is to be kept."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="export-scale-", dir=folder))
    try:
        yield place
    finally:
        if keep:
            click.echo(f"Kept in {place}", err=True)
        else:
            shutil.rmtree(place)


def measure(
    model: str, layout: str, checkpoint: Path, output: Path, progress: Progress
) -> Measurement:
    """Export `checkpoint` to `output` in a fresh process."""
    from full_size import MODELS

    from exporters.components.registry import components_of

    _, sizes = MODELS[model]
    count = sum(component.present(sizes) for component in components_of(sizes).values())
    task = progress.task(f"Exporting {model} in {layout} layout", total=count)
    command = [sys.executable, str(WORKER), str(checkpoint), str(output), PRECISION]
    told: dict[str, float] = {}
    seconds: dict[str, float] = {}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            if "component" in message:
                seconds[message["component"]] = message["seconds"]
                task.advance()
            else:
                told |= message
    if process.returncode:
        raise click.ClickException(f"the export failed with exit code {process.returncode}.")
    total = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Measurement(
        model=model,
        layout=layout,
        components=tuple(_row(output, name, spent) for name, spent in seconds.items()),
        seconds=round(total, 2),
        cpu_seconds=round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        import_seconds=round(told["imports"], 2),
        peak_bytes=int(told["peak"]),
        weight_bytes=sum(file.stat().st_size for file in checkpoint.rglob("*.safetensors")),
        written_bytes=_written_bytes(output, checkpoint),
    )


def _row(output: Path, name: str, seconds: float) -> ComponentRow:
    path = output / f"{name}.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    return ComponentRow(name, round(seconds, 2), len(graph.node), path.stat().st_size)


def _written_bytes(output: Path, checkpoint: Path) -> int:
    """The room that the files of `output` take on the disk, without those of the checkpoint."""
    linked = {file.stat().st_ino for file in checkpoint.rglob("*") if file.is_file()}
    files = {file.stat().st_ino: file.stat() for file in output.rglob("*") if file.is_file()}
    return sum(512 * status.st_blocks for inode, status in files.items() if inode not in linked)


def show(measurement: Measurement) -> None:
    """Print the table of a checkpoint."""
    title = f"FLUX.1, {measurement.model}, {measurement.layout} layout, {PRECISION}"
    table = Table("component", title=title)
    for heading in ("seconds", "nodes", "ONNX file"):
        table.add_column(heading, justify="right")
    for row in measurement.components:
        table.add_row(row.name, f"{row.seconds:.1f}", f"{row.nodes:,}", _megabytes(row.onnx_bytes))
    console = Console()
    console.print(table)
    seconds, cpu = measurement.seconds, measurement.cpu_seconds
    for heading, value, limit in (
        ("time, imports included", f"{seconds:.1f} s", f"{TARGETS.seconds:.0f} s"),
        (
            "peak resident memory",
            _megabytes(measurement.peak_bytes),
            _megabytes(TARGETS.peak_bytes),
        ),
        ("written", _megabytes(measurement.written_bytes), _megabytes(TARGETS.written_bytes)),
    ):
        console.print(f"{heading:>24}: {value} (target: under {limit})", highlight=False)
    console.print(f"{'processor time':>24}: {cpu:.1f} s", highlight=False)
    weights = f"{measurement.weight_bytes / 1e9:.1f} GB"
    console.print(f"{'weights, not touched':>24}: {weights}\n", highlight=False)


if __name__ == "__main__":
    main()
