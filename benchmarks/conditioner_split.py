"""What the conditioner's split brings: a step's time and memory with the AdaLN weights and without.

FLUX.1's width and heads at a reduced depth, with random weights, on ONNX Runtime. The published
one-piece graph computes the modulation of every block in each step. The bundle's conditioner does
that for all steps at once, before the first, and can then be closed. Each graph runs in a process
of its own; they take turns.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from engines import EngineOptions
from engines.onnxruntime import OnnxRuntime
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.components.component import Component
from exporters.components.mmdit import ONE_PIECE
from exporters.components.registry import COMPONENTS
from exporters.export import export_component, specify
from exporters.synthetic.sparse_checkpoint import flux_of_depth, write_random_checkpoint
from exporters.weights.bind import WeightFolder
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, RopeSpec, TensorSpec
from fluxdeploy.machine import describe_machine
from fluxdeploy.progress import Progress
from fluxdeploy.sampling.rope import joint_ids, rope_tables

Array = np.ndarray[Any, np.dtype[Any]]

PACKAGES = ("onnxruntime", "onnx", "numpy", "torch")
GRAPHS = {"one piece": ONE_PIECE, "transformer": COMPONENTS["transformer"]}
MAX_ERROR = 1e-3


@click.command()
@click.option("--double-blocks", default=1, show_default=True)
@click.option("--single-blocks", default=2, show_default=True)
@click.option("--size", default=512, show_default=True, help="Pixels of a side of the picture.")
@click.option("--text-tokens", default=512, show_default=True)
@click.option("--steps", default=28, show_default=True, help="Steps of a picture.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", type=int, help="Default: ONNX Runtime's choice.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
def main(
    double_blocks: int,
    single_blocks: int,
    size: int,
    text_tokens: int,
    steps: int,
    rounds: int,
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Time a step of the split transformer against the one-piece graph, and weigh both."""
    machine = describe_machine(PACKAGES)
    with tempfile.TemporaryDirectory(prefix="conditioner-split-") as place, Progress() as progress:
        folder = Path(place)
        task = progress.task("Writing random weights", total=1)
        write_random_checkpoint(folder / "checkpoint", flux_of_depth(double_blocks, single_blocks))
        task.advance()
        checkpoint = open_checkpoint(str(folder / "checkpoint"))
        report = measure(checkpoint, folder, size, text_tokens, steps, rounds, threads, progress)
    report = {
        "machine": machine,
        "double_blocks": double_blocks,
        "single_blocks": single_blocks,
        "image_tokens": (size // 16) ** 2,
        "text_tokens": text_tokens,
        "steps": steps,
        **report,
    }
    show(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(
    checkpoint: Checkpoint,
    folder: Path,
    size: int,
    text_tokens: int,
    steps: int,
    rounds: int,
    threads: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Seconds of each graph's rounds, and the memory of its process in bytes."""
    records = {
        name: _export(checkpoint, folder / name.replace(" ", "-"), graph)
        for name, graph in (*GRAPHS.items(), ("conditioner", COMPONENTS["conditioner"]))
    }
    given = _inputs(checkpoint, size, text_tokens)
    levels = np.linspace(1, 1 / steps, steps, dtype=np.float32)
    names = ("text_embeddings", "pooled_embeddings", "guidance")
    conditions = {name: given[name] for name in names} | {"timestep": levels}
    with _Graph(folder / "conditioner", records["conditioner"], threads) as conditioner:
        condition = conditioner.run(conditions)
        conditioner_seconds = [conditioner.time() for _ in range(rounds)]
        conditioner_memory = conditioner.memory
    given |= {"context": condition["context"], "modulation": condition["modulation"][0]}
    task = progress.task("Timing", total=rounds)
    with (
        _Graph(folder / "one-piece", records["one piece"], threads) as one_piece,
        _Graph(folder / "transformer", records["transformer"], threads) as split,
    ):
        expected = one_piece.run(given | {"timestep": levels[:1]})["latent"]
        found = split.run(given)["velocity"]
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        if error > MAX_ERROR:
            raise click.ClickException(f"The graphs differ by {error:.1e} of the largest output.")
        seconds: dict[str, list[float]] = {"one piece": [], "transformer": []}
        for _ in range(rounds):
            seconds["one piece"].append(one_piece.time())
            seconds["transformer"].append(split.time())
            task.advance()
        memory = {"one piece": one_piece.memory, "transformer": split.memory}
    return {
        "error": error,
        "seconds": {**seconds, "conditioner, all steps": conditioner_seconds},
        "process_bytes": {**memory, "conditioner": conditioner_memory},
    }


def _export(checkpoint: Checkpoint, folder: Path, component: Component) -> ComponentRecord:
    spec = specify(checkpoint, component, "fp32")
    exported = export_component(spec, WeightFolder(folder / "weights"), fused=True)
    runtime = OnnxRuntime()
    engine = EngineRecord(runtime.name, runtime.version(), "cpu", exported.path, {})
    chain = spec.chain
    return ComponentRecord("", "fp32", "fp32", chain.inputs, chain.outputs, (), (engine,), None)


def _inputs(checkpoint: Checkpoint, size: int, text_tokens: int) -> dict[str, Array]:
    """All that either graph takes, but for what the conditioner computes."""
    random = np.random.default_rng(0)
    config, side = checkpoint.transformer, size // 16
    text = random.standard_normal((1, text_tokens, config.text_width), np.float32)
    pooled = random.standard_normal((1, config.pooled_width), np.float32)
    ids = joint_ids(text_tokens, side, side, len(config.axes_dims))
    cos, sin = rope_tables(ids, RopeSpec(config.axes_dims, config.theta))
    ids = ids.astype(np.float32)
    return {
        "hidden_states": random.standard_normal((1, side * side, config.in_channels), np.float32),
        "encoder_hidden_states": text,
        "text_embeddings": text,
        "pooled_projections": pooled,
        "pooled_embeddings": pooled,
        "guidance": np.float32([3.5]),
        "txt_ids": ids[:text_tokens],
        "img_ids": ids[text_tokens:],
        "rope_cos": cos,
        "rope_sin": sin,
    }


class _Graph:
    """A graph in a process of its own. A context manager; the process ends with it."""

    def __init__(self, folder: Path, record: ComponentRecord, threads: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._inputs = record.inputs
        self._process = context.Process(
            target=_serve, args=(theirs, folder, record, threads), daemon=True
        )
        self._process.start()
        theirs.close()
        self.memory = 0

    def run(self, given: dict[str, Array]) -> dict[str, Array]:
        """The outputs for inputs picked from `given`, which later runs have too."""
        self._connection.send(_pick(self._inputs, given))
        outputs: dict[str, Array] = self._connection.recv()
        return outputs

    def time(self) -> float:
        """Seconds of another run."""
        self._connection.send(None)
        seconds, self.memory = self._connection.recv()
        return float(seconds)

    def __enter__(self) -> _Graph:
        return self

    def __exit__(self, *unused: object) -> None:
        self._connection.close()
        self._process.join()


def _pick(specs: tuple[TensorSpec, ...], given: dict[str, Array]) -> dict[str, Array]:
    return {spec.name: given[spec.name] for spec in specs}


def _serve(
    connection: Connection, folder: Path, record: ComponentRecord, threads: int | None
) -> None:
    runtime, engine = OnnxRuntime(), record.engines[0]
    opened = runtime.open("transformer", record, engine, folder, EngineOptions(threads))
    inputs: dict[str, Array] = {}
    while True:
        try:
            given = connection.recv()
        except EOFError:
            return
        if given is not None:
            inputs = given
            connection.send(opened.run(inputs))
            continue
        started = time.perf_counter()
        opened.run(inputs)
        connection.send((time.perf_counter() - started, _resident_bytes()))


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    seconds, memory = report["seconds"], report["process_bytes"]
    ratios = [a / b for a, b in zip(seconds["one piece"], seconds["transformer"], strict=True)]
    table = Table("", "seconds, median", "process, GB", title="A step of the transformer")
    for name, values in seconds.items():
        size = memory[name.partition(",")[0]] / 1e9
        table.add_row(name, f"{statistics.median(values):.3f}", f"{size:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"Split: {statistics.median(ratios):.3f} times as fast "
        f"({min(ratios):.3f}-{max(ratios):.3f}), outputs within {report['error']:.1e}."
    )


if __name__ == "__main__":
    main()
