"""How often the Fill and the Kontext demo do what a prompt says, over scenes held out of training.

Draws with diffusers' pipelines in float32, and scores the pictures with `fluxdeploy.demo.matches`.
"""

from __future__ import annotations

import json
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import FluxFillPipeline, FluxKontextPipeline
from PIL import Image, ImageDraw

from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.demo.assemble import assemble
from fluxdeploy.demo.edits import Edit, sample_edit
from fluxdeploy.demo.holes import Hole, sample_hole
from fluxdeploy.demo.matches import match_edit, match_fill
from fluxdeploy.demo.scenes import draw
from fluxdeploy.demo.survey import PICTURE_SIZES
from fluxdeploy.machine import describe_machine
from fluxdeploy.progress import Progress

Array = np.ndarray[Any, np.dtype[Any]]

PACKAGES = ("torch", "diffusers", "numpy")
TARGET = 0.8
SEED = 1
_SHOWN = 24


@dataclass(frozen=True)
class Task:
    """How a task's scenes are drawn from random numbers, shown, answered and scored."""

    pipeline: Any
    sample: Callable[..., Any]
    shown: Callable[[Any], Array]
    inputs: Callable[[Sequence[Any]], dict[str, Any]]
    match: Callable[[Array, Any], Any]


def fill_inputs(holes: Sequence[Hole]) -> dict[str, Any]:
    """What diffusers' FluxFillPipeline takes for holes in pictures of one size."""
    return {
        "image": [Image.fromarray(draw(hole.drawing)) for hole in holes],
        "mask_image": [Image.fromarray(hole.mask) for hole in holes],
    }


def edit_inputs(edits: Sequence[Edit]) -> dict[str, Any]:
    """What diffusers' FluxKontextPipeline takes for pictures of one size."""
    drawing = edits[0].before
    return {
        "image": [Image.fromarray(draw(edit.before)) for edit in edits],
        "max_area": drawing.height * drawing.width,
        "_auto_resize": False,
    }


def _with_hole(hole: Hole) -> Array:
    picture = draw(hole.drawing)
    rows, columns = np.indices(hole.mask.shape) // 4
    picture[hole.mask] = np.where((rows + columns) % 2, 200, 90)[hole.mask][:, None]
    return picture


TASKS = {
    "fill": Task(FluxFillPipeline, sample_hole, _with_hole, fill_inputs, match_fill),
    "kontext": Task(
        FluxKontextPipeline, sample_edit, lambda edit: draw(edit.before), edit_inputs, match_edit
    ),
}


@click.command()
@click.argument("name", type=click.Choice(list(TASKS)))
@click.argument("difference", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--scenes", default=128, show_default=True, help="Number of held-out scenes.")
@click.option("--steps", default=28, show_default=True)
@click.option("--guidance", default=1.0, show_default=True)
@click.option("--batch", default=8, show_default=True, help="Pictures drawn at once.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Draw pictures into this PNG file.")
def main(
    name: str,
    difference: Path,
    scenes: int,
    steps: int,
    guidance: float,
    batch: int,
    json_file: Path | None,
    sheet: Path | None,
) -> None:
    """Score the demo NAME from the folder DIFFERENCE; exits with 1 where the target is missed."""
    task = TASKS[name]
    rng = np.random.default_rng(SEED)
    asked: dict[tuple[int, int], list[Any]] = {}
    for number in range(scenes):
        size = PICTURE_SIZES[number % len(PICTURE_SIZES)]
        asked.setdefault(size, []).append(task.sample(rng, *size, "held-out"))
    matches: list[Any] = []
    cells: list[Array] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="demo-tasks-") as place, Progress() as progress:
        folder = Path(place) / name
        assemble(DEMO_CHECKPOINTS["demo:dev"], difference, folder)
        pipe = task.pipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        bar = progress.task(f"demo:{name}", total=scenes)
        for size, group in asked.items():
            for start in range(0, len(group), batch):
                some = group[start : start + batch]
                pictures = _answer(pipe, task, some, size, steps, guidance)
                scores = [task.match(p, one) for p, one in zip(pictures, some, strict=True)]
                matches += scores
                for picture, one, score in zip(pictures, some, scores, strict=True):
                    cells.append(_cell(task.shown(one), picture, one.prompt, score.right))
                bar.advance(len(some))
    report: dict[str, Any] = {
        "machine": describe_machine(PACKAGES),
        "task": name,
        "scenes": scenes,
        "steps": steps,
        "guidance": guidance,
        "seconds_per_picture": round((time.perf_counter() - started) / scenes, 3),
        "right": _share([match.right for match in matches]),
        **{
            field: _share([getattr(match, field) for match in matches])
            for field in matches[0].__dataclass_fields__
        },
    }
    click.echo(json.dumps({key: report[key] for key in report if key != "machine"}))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if sheet is not None:
        _sheet(cells[:: max(1, len(cells) // _SHOWN)][:_SHOWN]).save(sheet)
    if report["right"] < TARGET:
        raise click.ClickException(f"{report['right']:.1%} are right, not {TARGET:.0%}")


def _share(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def _answer(
    pipe: Any, task: Task, some: Sequence[Any], size: tuple[int, int], steps: int, guidance: float
) -> Array:
    output = pipe(
        prompt=[one.prompt for one in some],
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=20,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="np",
        **task.inputs(some),
    )
    pictures: Array = np.rint(255 * np.asarray(output.images)).astype(np.uint8)
    return pictures


def _cell(shown: Array, picture: Array, prompt: str, right: bool) -> Array:
    """The picture given, the one drawn, and the prompt: uint8 [200, 336, 3]."""
    cell = Image.new("RGB", (336, 200), "white")
    cell.paste(Image.fromarray(shown), (4, 4))
    cell.paste(Image.fromarray(picture), (172, 4))
    words = "\n".join(textwrap.wrap(prompt, 52))
    ImageDraw.Draw(cell).text((6, 168), words, "black" if right else "red")
    return np.asarray(cell)


def _sheet(cells: Sequence[Array]) -> Image.Image:
    rows = [np.concatenate(cells[at : at + 4], 1) for at in range(0, len(cells) // 4 * 4, 4)]
    return Image.fromarray(np.concatenate(rows))


if __name__ == "__main__":
    main()
