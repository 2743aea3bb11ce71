"""Quantizing checkpoints that nobody tuned anything for: what recipes spare, and what they keep.

Makes random checkpoints of odd shapes with hard weights (outlying channels, sharpened attention,
tiny heads) and takes the package's own two. For each precision the recipe is found as `build` finds
it, and its pictures are then held against float32 over prompts and seeds that the search did not
see. All of it is computed in PyTorch, so that no engine and no GPU is needed.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from exporters.calibrate.ranges import ActivationRanges, measure_ranges
from exporters.calibrate.trajectory import default_calibration
from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS, choose_precisions
from exporters.quality.emulate import Emulator
from exporters.quality.judge import PictureJudge
from exporters.quality.layers import Layers
from exporters.quality.recipes import Asked, Found, find_recipes, layers_of
from fluxdeploy.build.checkpoint import find_checkpoint
from fluxdeploy.bundle.recipe import NOTHING
from fluxdeploy.machine import describe_machine
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress
from tests.support.checkpoints import Shape, make_checkpoint

PACKAGES = ("torch", "numpy")
QUANTIZED = ("fp8", "fp8-weights", "int8", "int8-dynamic", "int4-weights", "fp4")
DEMO = ("demo:dev", "demo:schnell")
HELD_OUT = (
    "a bicycle that leans on a yellow wall, long shadows",
    "a green square below a white circle",
    "close-up of a bee on a thistle, blurred meadow",
)
SETTINGS = {"height": 128, "width": 128, "num_inference_steps": 12, "max_sequence_length": 48}


def shapes() -> Iterator[tuple[Shape, float]]:
    """Ten shapes, with how far some channels stand out."""
    sizes = (
        (32, 3, (8, 12, 12), 3, 2),
        (8, 6, (2, 2, 4), 1, 1),
        (24, 4, (4, 8, 12), 2, 2),
        (64, 2, (16, 24, 24), 1, 4),
        (16, 5, (4, 6, 6), 4, 1),
        (40, 3, (8, 16, 16), 2, 6),
        (12, 8, (4, 4, 4), 6, 6),
        (48, 2, (16, 16, 16), 5, 3),
        (28, 5, (4, 12, 12), 2, 1),
        (20, 4, (4, 8, 8), 3, 3),
    )
    for number, (head_dim, heads, axes, double, single) in enumerate(sizes):
        shape = Shape(
            f"{heads}x{head_dim}, {double}+{single}",
            head_dim=head_dim,
            heads=heads,
            axes_dims=axes,
            double=double,
            single=single,
            guidance=number % 2 == 0,
            seed=100 + number,
            settings=SETTINGS,
        )
        yield shape, (1.0, 4.0, 12.0, 30.0)[number % 4]


@torch.no_grad()
def add_outliers(folder: Path, factor: float) -> None:
    """Let a few channels of each MLP and of each modulation stand out."""
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(5)
    for name, weight in tensors.items():
        if name.endswith(("net.0.proj.weight", "proj_mlp.weight", "norm1.linear.weight")):
            rows = torch.randperm(len(weight), generator=generator)[:3]
            weight[rows] *= factor
    save_file(tensors, file, {"format": "pt"})


@click.command()
@click.option("--precision", "precisions", multiple=True, type=click.Choice(QUANTIZED))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
def main(precisions: tuple[str, ...], json_file: Path | None) -> None:
    """Find recipes for odd checkpoints and for the demo's, and hold them against other prompts."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="recipes-") as place:
        for name, checkpoint in _checkpoints(Path(place)):
            ranges = measure_ranges(
                checkpoint, "", default_calibration(checkpoint), None, Progress(quiet=True)
            )
            for precision in precisions or QUANTIZED:
                rows.append({"checkpoint": name, **_measure(checkpoint, precision, ranges)})
                print(json.dumps(rows[-1]), flush=True)
    show(rows)
    report = {"machine": describe_machine(PACKAGES), "held_out": HELD_OUT, "rows": rows}
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _checkpoints(place: Path) -> Iterator[tuple[str, Checkpoint]]:
    for shape, factor in shapes():
        folder = make_checkpoint(place / str(shape.seed), shape)
        add_outliers(folder, factor)
        yield f"{shape.name}, outliers {factor:g}", find_checkpoint(str(folder))
    for name in DEMO:
        yield name, find_checkpoint(name)


def _measure(checkpoint: Checkpoint, precision: str, ranges: ActivationRanges) -> dict[str, Any]:
    started = time.perf_counter()
    quiet = Progress(quiet=True)
    chosen = choose_precisions(COMPONENTS, precision, {})
    asked = [
        Asked(COMPONENTS[name], of, "bf16")
        for name, of in chosen.items()
        if PRECISIONS[of].quantization is not None
    ]
    judged = find_recipes(checkpoint, asked, lambda: ranges, None, Found(), quiet)
    found = judged.recipes
    seconds = time.perf_counter() - started
    record = found["transformer"]
    layers = {
        a.component.name: layers_of(
            a,
            checkpoint,
            found[a.component.name].recipe,
            ranges,
            judged.means.get(a.component.name, {}),
            judged.moments.get(a.component.name, {}),
        )
        for a in asked
    }
    kept = _judge(checkpoint, asked, layers)
    left = list(record.recipe.spared.values())
    assert record.before is not None
    assert record.after is not None
    return {
        "precision": precision,
        "promised": record.promise.psnr,
        "before": record.before.psnr,
        "after": record.after.psnr,
        "held_out": kept,
        "kept": kept >= (record.promise.psnr or 0),
        "worst_layer": record.after.worst_layer,
        "share": record.share,
        "wide": left.count(NOTHING),
        "narrow_weights": len(left) - left.count(NOTHING),
        "smoothed": len(record.recipe.smoothed),
        "spared_elsewhere": {n: r.share for n, r in found.items() if n != "transformer"},
        "seconds": seconds,
    }


def _judge(checkpoint: Checkpoint, asked: Sequence[Asked], layers: Mapping[str, Layers]) -> float:
    """The median over pictures of prompts and seeds that nothing was found with, in dB."""
    emulators = {a.component.name: Emulator(a.component, checkpoint, a.compute) for a in asked}
    others = {n: (e, layers[n]) for n, e in emulators.items() if n != "transformer"}
    usual = default_calibration(checkpoint)
    steps = min(checkpoint.defaults.num_inference_steps, 28)
    sets = [
        replace(usual, prompts=HELD_OUT, seed=77, sizes=usual.sizes[:2], steps=4),
        replace(usual, prompts=HELD_OUT[:2], seed=78, sizes=usual.sizes[:1], steps=steps),
    ]
    quiet = Progress(quiet=True)
    judge = PictureJudge(checkpoint, emulators["transformer"], others, quiet, sets)
    found = judge.judge(layers["transformer"]).psnr
    assert found is not None
    return found


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table."""
    table = Table("checkpoint", "precision")
    for heading in ("promised", "before", "after", "held out", "spared", "smoothed", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["checkpoint"],
            row["precision"],
            *(f"{row[key]:.1f} dB" for key in ("promised", "before", "after", "held_out")),
            f"{row['share']:.0%}",
            str(row["smoothed"]),
            f"{row['seconds']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
