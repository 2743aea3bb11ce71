"""How often the demo checkpoints draw what a prompt says, over prompts that training never saw.

Draws each prompt with the bundle of `demo:dev` and that of `demo:schnell`, and scores the pictures
with `fluxdeploy.demo.scorer`; then the scores over the number of steps and over the guidance.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from fluxdeploy.build.build import build
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.demo.survey import PICTURE_SIZES, Draw, Question, Shares, ask, survey
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.machine import describe_machine
from fluxdeploy.progress import Progress

Array = np.ndarray[Any, np.dtype[Any]]

PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")

STEPS = {"dev": 28, "schnell": 4}
STEP_CURVE = (1, 2, 4, 8, 16, 28)
GUIDANCE_CURVE = (1.0, 2.0, 3.0, 4.0, 6.0)
MEASURES = tuple(field.name for field in fields(Shares) if field.name != "pictures")
SIZE = f"{PICTURE_SIZES[0][1]}x{PICTURE_SIZES[0][0]} (half of them), " + ", ".join(
    f"{width}x{height}" for height, width in dict.fromkeys(PICTURE_SIZES[1::2])
)


@dataclass(frozen=True)
class Target:
    """Shares that a checkpoint must reach over the held-out prompts."""

    objects: float
    relation: float


TARGETS = {"dev": Target(0.95, 0.85), "schnell": Target(0.90, 0.75)}


@click.command()
@click.option("--dev", type=click.Path(path_type=Path, exists=True), help="A bundle of demo:dev.")
@click.option(
    "--schnell", type=click.Path(path_type=Path, exists=True), help="A bundle of demo:schnell."
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="Precision of the bundles that are built where none are given.",
)
@click.option("--prompts", default=300, show_default=True, help="Number of held-out prompts.")
@click.option(
    "--curve-prompts",
    default=100,
    show_default=True,
    help="How many of them each point of a curve takes; 0 leaves the curves out.",
)
@click.option("--batch", default=8, show_default=True, help="Pictures drawn at once.")
@click.option(
    "--against-pytorch",
    is_flag=True,
    help="Also draw the prompts with diffusers' FluxPipeline, in float32.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the curves into this PNG file.")
def main(
    dev: Path | None,
    schnell: Path | None,
    precision: str,
    prompts: int,
    curve_prompts: int,
    batch: int,
    against_pytorch: bool,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Score the demo checkpoints on held-out prompts; exits with 1 where a target is missed.

    Bundles that are not given are built into a temporary folder.
    """
    if plot is not None and not curve_prompts:
        raise click.UsageError("--plot needs the curves. Leave out --curve-prompts 0.")
    questions = ask(prompts)
    report: dict[str, Any] = {
        "machine": describe_machine(PACKAGES),
        "prompts": prompts,
        "targets": {name: asdict(target) for name, target in TARGETS.items()},
        "checkpoints": {},
        "steps": {},
        "guidance": {},
    }
    with tempfile.TemporaryDirectory(prefix="demo-scores-") as folder, Progress() as progress:
        for name, bundle in (("dev", dev), ("schnell", schnell)):
            if bundle is None:
                bundle = Path(folder) / name
                build(BuildRequest(f"demo:{name}", precision), bundle, progress)
            study = Study(name, batch, progress)
            with FluxPipeline.from_bundle(bundle) as pipe:
                report["checkpoints"][name] = study.checkpoint(pipe, questions, against_pytorch)
                some = questions[:curve_prompts]
                if some:
                    report["steps"][name] = study.over_steps(pipe, some)
                if some and pipe.bundle.manifest.guidance_embedding:
                    report["guidance"][name] = study.over_guidance(pipe, some)
    show(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        plot_curves(report, plot)
    missed = list(_missed(report))
    if missed:
        raise click.ClickException(f"short of the target: {'; '.join(missed)}")


class Study:
    """What is measured of one checkpoint."""

    def __init__(self, name: str, batch: int, progress: Progress) -> None:
        self.name = name
        self.batch = batch
        self.progress = progress

    def checkpoint(
        self, pipe: FluxPipeline, questions: Sequence[Question], against_pytorch: bool
    ) -> dict[str, Any]:
        """The scores at the checkpoint's own settings, and PyTorch's beside them."""
        manifest = pipe.bundle.manifest
        steps = STEPS[self.name]
        guidance = manifest.defaults.guidance_scale if manifest.guidance_embedding else None
        drawn: list[Array] = []
        started = time.perf_counter()
        shares = self._survey("bundle", recorded(drawer(pipe, steps, guidance), drawn), questions)
        row = {
            "steps": steps,
            "guidance": guidance,
            "size": SIZE,
            **asdict(shares),
            "seconds_per_picture": round((time.perf_counter() - started) / len(questions), 4),
            "precision": manifest.components["transformer"].precision,
            "parameters": count_parameters(DEMO_CHECKPOINTS[f"demo:{self.name}"]),
            "training_minutes": training_minutes(self.name),
        }
        if against_pytorch:
            expected: list[Array] = []
            pytorch = load_reference(DEMO_CHECKPOINTS[f"demo:{self.name}"])
            length = manifest.defaults.max_sequence_length
            draw = reference_drawer(pytorch, steps, guidance, length)
            scores = self._survey("PyTorch", recorded(draw, expected), questions)
            worst = max(float(np.abs(a - b).max()) for a, b in zip(drawn, expected, strict=True))
            row["pytorch"] = {**asdict(scores), "largest_difference_of_255": round(255 * worst, 4)}
        return row

    def over_steps(self, pipe: FluxPipeline, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """The scores at each number of steps."""
        return [
            {"steps": n, **self._curve_point(f"steps {n}", drawer(pipe, n, None), questions)}
            for n in STEP_CURVE
        ]

    def over_guidance(
        self, pipe: FluxPipeline, questions: Sequence[Question]
    ) -> list[dict[str, Any]]:
        """The scores at each guidance scale."""
        steps = STEPS[self.name]
        return [
            {
                "guidance": scale,
                **self._curve_point(f"guidance {scale:g}", drawer(pipe, steps, scale), questions),
            }
            for scale in GUIDANCE_CURVE
        ]

    def _curve_point(self, title: str, draw: Draw, questions: Sequence[Question]) -> dict[str, Any]:
        return asdict(self._survey(title, draw, questions))

    def _survey(self, title: str, draw: Draw, questions: Sequence[Question]) -> Shares:
        task = self.progress.task(f"demo:{self.name}, {title}", total=len(questions))
        return survey(draw, questions, self.batch, task.advance)


def drawer(pipe: FluxPipeline, steps: int, guidance: float | None) -> Draw:
    """Draw with a bundle; guidance None is its default."""

    def draw(prompts: Sequence[str], height: int, width: int, seed: int) -> Array:
        output = pipe(
            prompts,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            output_type="np",
        )
        return np.asarray(output.images)

    return draw


def recorded(draw: Draw, drawn: list[Array]) -> Draw:
    """Draw the same, and keep the pictures in `drawn`."""

    def record(prompts: Sequence[str], height: int, width: int, seed: int) -> Array:
        drawn.append(draw(prompts, height, width, seed))
        return drawn[-1]

    return record


def load_reference(folder: Path) -> Any:
    """diffusers' FluxPipeline of a checkpoint, in float32 on the CPU."""
    import torch
    from diffusers import FluxPipeline as Reference

    pipe = Reference.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference_drawer(pipe: Any, steps: int, guidance: float | None, length: int) -> Draw:
    """Draw with diffusers."""
    import torch

    def draw(prompts: Sequence[str], height: int, width: int, seed: int) -> Array:
        output = pipe(
            list(prompts),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=0.0 if guidance is None else guidance,
            max_sequence_length=length,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
        )
        return np.asarray(output.images)

    return draw


def count_parameters(folder: Path) -> int:
    """The parameters of all parts of a checkpoint."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def training_minutes(name: str) -> float:
    """What the training of a checkpoint took, as the training itself recorded it."""
    folder = DEMO_CHECKPOINTS[f"demo:{name}"].parent
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    stages: dict[str, dict[str, Any]] = record["stages"]
    unused = {"few_steps"} if name == "dev" else set()
    return round(sum(stages[stage]["minutes"] for stage in stages.keys() - unused), 1)


def _missed(report: dict[str, Any]) -> Iterator[str]:
    for name, target in report["targets"].items():
        for measure, least in target.items():
            share = report["checkpoints"][name][measure]
            if share is not None and share < least:
                yield f"{name} has {measure} right in {share:.1%}, not {least:.0%}"


def show(report: dict[str, Any]) -> None:
    """Print the table of all scores."""
    table = Table("", title=f"{report['prompts']} held-out prompts")
    for heading in MEASURES:
        table.add_column(heading, justify="right")
    for name, row in report["checkpoints"].items():
        guidance = "" if row["guidance"] is None else f", guidance {row['guidance']:g}"
        table.add_row(f"{name}, {row['steps']} steps{guidance}", *_percentages(row))
        if "pytorch" in row:
            table.add_row("  PyTorch, same seeds", *_percentages(row["pytorch"]))
        target = report["targets"][name]
        table.add_row("  target", *(_percent(target.get(m)) for m in MEASURES), end_section=True)
    for curves in ("steps", "guidance"):
        for name, rows in report[curves].items():
            for row in rows:
                table.add_row(f"{name}, {curves} {row[curves]:g}", *_percentages(row))
            table.add_section()
    console = Console()
    console.print(table)
    for name, row in report["checkpoints"].items():
        seconds = f"{row['seconds_per_picture']:.2f} s a picture"
        line = f"{name}: {row['parameters']:,} parameters, {seconds}"
        if "pytorch" in row:
            worst = row["pytorch"]["largest_difference_of_255"]
            line += f", at most {worst:g}/255 from PyTorch's pictures"
        console.print(line, highlight=False)


def _percentages(row: dict[str, Any]) -> list[str]:
    return [_percent(row[measure]) for measure in MEASURES]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def plot_curves(report: dict[str, Any], path: Path) -> None:
    """Draw the scores over steps and over guidance, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    colours = {"dev": "tab:blue", "schnell": "tab:orange"}
    for axis, kind in zip(axes, ("steps", "guidance"), strict=True):
        for name, rows in report[kind].items():
            for measure, style in (("objects", "o-"), ("relation", "s--")):
                points = [(row[kind], row[measure]) for row in rows if row[measure] is not None]
                label = f"demo:{name}, {measure}"
                axis.plot(*zip(*points, strict=True), style, color=colours[name], label=label)
        axis.grid(alpha=0.3)
    axes[0].set(xscale="log", xlabel="steps", ylabel="right", ylim=(-0.03, 1.03))
    axes[0].set_xticks(STEP_CURVE, [str(n) for n in STEP_CURVE])
    axes[0].minorticks_off()
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].legend(fontsize="small")
    axes[1].set(xlabel=f"guidance_scale, {STEPS['dev']} steps")
    axes[1].set_xticks(GUIDANCE_CURVE)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
