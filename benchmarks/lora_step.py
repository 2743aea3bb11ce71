"""What LoRAs that come with a call cost in a step, on the demo model.

Three pipelines draw in turns: the bundle as `fluxdeploy build` makes it, one with side paths and
no LoRA in use, and the same one with a LoRA of the whole rank at every linear. The threads are the
runtime's own choice for all of them.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from fluxdeploy.build.build import build
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.bundle.side_paths import find_side_paths
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.machine import describe_machine
from fluxdeploy.progress import Progress

PROMPT = "a large red circle above a small blue square"
SIZES = (128, 256, 512)
"""Pixels of a side."""


@click.command()
@click.option("--base", type=click.Path(path_type=Path), help="A bundle without side paths.")
@click.option("--ranked", type=click.Path(path_type=Path), help="The same with side paths.")
@click.option("--rank", default=16, show_default=True, help="Of the side paths that are built.")
@click.option("--steps", default=8, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
def main(
    base: Path | None,
    ranked: Path | None,
    rank: int,
    steps: int,
    rounds: int,
    json_file: Path | None,
) -> None:
    """Time steps without side paths, with idle ones, and with a LoRA."""
    with tempfile.TemporaryDirectory(prefix="lora-step-") as place:
        base = base or make_bundle(Path(place) / "base", 0)
        ranked = ranked or make_bundle(Path(place) / "ranked", rank)
        with (
            FluxPipeline.from_bundle(base) as without,
            FluxPipeline.from_bundle(ranked) as beside,
        ):
            manifest = beside.bundle.manifest
            lora = write_lora(manifest, Path(place) / "lora.safetensors")
            contenders = {
                "without side paths": (without, None),
                "side paths, idle": (beside, None),
                f"a LoRA of rank {manifest.lora_rank}": (beside, lora),
            }
            sizes = [measure(contenders, size, steps, rounds) for size in SIZES]
    result = {
        "machine": describe_machine(("numpy", "onnxruntime", "openvino")),
        "precision": manifest.components["transformer"].precision,
        "runtime": manifest.components["transformer"].engines[0].runtime,
        "rank": manifest.lora_rank,
        "steps": steps,
        "rounds": rounds,
        "sizes": sizes,
    }
    show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_bundle(folder: Path, rank: int) -> Path:
    """The demo's bundle."""
    with Progress() as progress:
        build(BuildRequest(lora_rank=rank), folder, progress)
    return folder


def write_lora(manifest: Manifest, path: Path) -> Path:
    """A LoRA of the whole rank at every linear, too weak to draw something else."""
    random = np.random.default_rng(0)
    tensors: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    for record in manifest.components.values():
        paths = find_side_paths({spec.name: spec.shape for spec in record.inputs})
        for kind in paths.values():
            for block in range(kind.blocks):
                name = kind.kind.replace("*", str(block))
                if name.startswith("norm_out."):
                    continue  # halves of one linear in a file
                down = random.standard_normal((manifest.lora_rank, kind.columns), np.float32)
                up = random.standard_normal((kind.rows, manifest.lora_rank), np.float32)
                tensors[f"transformer.{name}.lora_A.weight"] = down
                tensors[f"transformer.{name}.lora_B.weight"] = np.float32(1e-5) * up
    save_file(tensors, path)
    return path


def measure(
    contenders: dict[str, tuple[FluxPipeline, Path | None]], size: int, steps: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds of a step, the median of the rounds after a first one, with all in turns."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, (pipe, lora) in contenders.items():
            output = pipe(
                PROMPT,
                height=size,
                width=size,
                num_inference_steps=steps,
                seed=0,
                lora=lora,
                output_type="latent",
            )
            taken[name].append(1e3 * output.seconds["denoising"] / steps)
    medians = {name: statistics.median(values[1:]) for name, values in taken.items()}
    return {"size": size, "milliseconds": medians}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    names = list(result["sizes"][0]["milliseconds"])
    table = Table("size", *names, title=f"Milliseconds of a step, {result['precision']}")
    for row in result["sizes"]:
        table.add_row(str(row["size"]), *(f"{row['milliseconds'][name]:.2f}" for name in names))
    Console().print(table)


if __name__ == "__main__":
    main()
