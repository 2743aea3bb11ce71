"""Quality against evaluations of the velocity: each sampler, and steps that `tune` lets be skipped.

A sampler's pictures are held against where the path ends, which many steps of RK4 show. Skipped
steps are held against the same pictures without skips, beside Euler with fewer steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fluxdeploy.demo.survey import ask
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.machine import describe_machine
from fluxdeploy.progress import Progress
from fluxdeploy.sampling.sampler import load_sampler, sampler_names
from fluxdeploy.similarity import psnr
from fluxdeploy.verify.skips import find_skips

STEPS = (4, 8, 14, 28)
EXACT = ("rk4", 50)
WANTED = (28.0, 34.0, 40.0, 46.0)
"""What `tune` is asked to keep, in dB."""


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--pictures", default=8, show_default=True, help="Of held-out scenes.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Also draw this PNG; needs matplotlib."
)
def main(bundle: Path, pictures: int, json_file: Path | None, plot: Path | None) -> None:
    """Measure BUNDLE's samplers and skips by the worst and the median of some pictures."""
    prompts = [question.prompt for question in ask(pictures)]
    with FluxPipeline.from_bundle(bundle) as pipe, Progress() as progress:
        result = {
            "machine": describe_machine(("numpy", "onnxruntime")),
            "pictures": pictures,
            "exact": EXACT,
            "samplers": measure_samplers(pipe, prompts, progress),
            **measure_skips(pipe, prompts, progress),
        }
    show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        draw_plot(result, plot)


def draw(pipe: FluxPipeline, prompts: Sequence[str], sampler: str, steps: int) -> NDArray[Any]:
    """Pictures, float32 [B, H, W, 3] in 0..1."""
    seeds = list(range(len(prompts)))
    options = {"sampler": sampler, "num_inference_steps": steps, "output_type": "np"}
    return np.asarray(pipe(list(prompts), seed=seeds, **options).images)  # type: ignore[arg-type]


def compare(pictures: NDArray[Any], others: NDArray[Any]) -> dict[str, float]:
    """dB of the picture that differs most, and of the one in the middle."""
    found = [psnr(one, other) for one, other in zip(pictures, others, strict=True)]
    return {"least": float(min(found)), "median": float(np.median(found))}


def measure_samplers(
    pipe: FluxPipeline, prompts: Sequence[str], progress: Progress
) -> list[dict[str, Any]]:
    """Every sampler with a few numbers of steps, against the exact end."""
    task = progress.task("Samplers", total=len(sampler_names()) * len(STEPS))
    exact = draw(pipe, prompts, *EXACT)
    rows = []
    for name in sampler_names():
        for steps in STEPS:
            found = compare(draw(pipe, prompts, name, steps), exact)
            evaluations = load_sampler(name).evaluations(steps)
            rows.append({"sampler": name, "steps": steps, "evaluations": evaluations, **found})
            task.advance()
    return rows


def measure_skips(
    pipe: FluxPipeline, prompts: Sequence[str], progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """What `tune` finds for each quality, and what fewer steps keep of the same pictures."""
    defaults = pipe.bundle.manifest.defaults
    steps, size = defaults.num_inference_steps, (defaults.height, defaults.width)
    whole = draw(pipe, prompts, "euler", steps)
    fewer = [
        {"evaluations": count, **compare(draw(pipe, prompts, "euler", count), whole)}
        for count in range(steps // 4, steps, steps // 7)
    ]
    tuned = []
    for wanted in WANTED:
        tuning = find_skips(
            pipe, prompts[::2], prompts[1::2], wanted, "euler", steps, *size, progress
        )
        skipped = () if tuning.record is None else tuning.record.steps
        tuned.append(
            {"wanted": wanted, "evaluations": steps - len(skipped), "least": tuning.reached}
        )
    return {"tuned": tuned, "fewer_steps": fewer}


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    table = Table("sampler", "steps", "evaluations", "least dB", "median dB")
    for row in result["samplers"]:
        table.add_row(
            row["sampler"],
            str(row["steps"]),
            str(row["evaluations"]),
            f"{row['least']:.1f}",
            f"{row['median']:.1f}",
        )
    skips = Table("what", "evaluations", "least dB")
    for row in result["tuned"]:
        what = f"tune, {row['wanted']:g} dB asked"
        skips.add_row(what, str(row["evaluations"]), f"{row['least']:.1f}")
    for row in result["fewer_steps"]:
        skips.add_row("fewer steps", str(row["evaluations"]), f"{row['least']:.1f}")
    console = Console()
    console.print(table)
    console.print(skips)


def draw_plot(result: dict[str, Any], path: Path) -> None:
    """Both comparisons over the number of evaluations."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name in dict.fromkeys(row["sampler"] for row in result["samplers"]):
        rows = [row for row in result["samplers"] if row["sampler"] == name]
        left.plot([r["evaluations"] for r in rows], [r["median"] for r in rows], "o-", label=name)
    left.set(title="Against the end of the path", xlabel="evaluations", ylabel="median PSNR, dB")
    left.set_xscale("log", base=2)
    for key, name in (("tuned", "tune, held-out pictures"), ("fewer_steps", "fewer steps")):
        rows = sorted(result[key], key=lambda row: row["evaluations"])
        right.plot([r["evaluations"] for r in rows], [r["least"] for r in rows], "o-", label=name)
    right.set(
        title="Against all steps of Euler", xlabel="evaluations", ylabel="PSNR of the worst, dB"
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
