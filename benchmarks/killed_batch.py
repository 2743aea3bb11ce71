"""Many pictures, killed at random moments: nothing lost, nothing doubled, each picture right.

`python benchmarks/killed_batch.py BUNDLE --json benchmarks/results/killed_batch.json`
"""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy as np
from PIL import Image

from fluxdeploy import FluxPipeline
from fluxdeploy.machine import describe_cpu
from tests.support.killed import kill_at, lines_of, made_wrongly

SIZES = ((64, 64), (64, 96), (96, 64), (96, 96), (128, 64), (96, 128), (128, 128), (160, 96))
STEPS = (2, 3, 4)
COLOURS = ("red", "green", "blue", "yellow", "pink", "orange")
SHAPES = ("circle", "square", "star", "heart", "ring", "triangle")


def make_row(rng: random.Random, number: int) -> dict[str, Any]:
    width, height = rng.choice(SIZES)
    return {
        "prompt": f"a {rng.choice(COLOURS)} {rng.choice(SHAPES)} above a {rng.choice(COLOURS)} "
        f"{rng.choice(SHAPES)}",
        "seed": number,
        "width": width,
        "height": height,
        "num_inference_steps": rng.choice(STEPS),
    }


def largest_difference(bundle: Path, folder: Path, rows: list[dict[str, Any]]) -> int:
    """Of a level, 0 to 255, between the pictures and what calls of their own draw."""
    largest = 0
    with FluxPipeline.from_bundle(bundle) as pipe:
        for number, row in enumerate(rows, 1):
            (alone,) = pipe(**row).images
            with Image.open(folder / f"x-{number:05}.png") as made:
                if made.size != alone.size:
                    return 255
                apart = np.abs(np.asarray(made, int) - np.asarray(alone, int))
            largest = max(largest, int(apart.max()))
    return largest


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--prompts", "count", type=click.IntRange(min=1), default=200, help="Pictures.")
@click.option("--kills", type=click.IntRange(min=0), default=10, help="How often it is killed.")
@click.option("--seed", type=int, default=0, help="Of the prompts and of the moments.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Where to write figures.")
def main(bundle: Path, count: int, kills: int, seed: int, report: Path | None) -> None:
    """Run, kill, and compare."""
    rng = random.Random(seed)
    rows = [make_row(rng, number) for number in range(count)]
    with tempfile.TemporaryDirectory() as name:
        source, folder = Path(name, "prompts.jsonl"), Path(name, "made")
        folder.mkdir()
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        index = folder / "x.index.jsonl"
        command = [sys.executable, "-m", "fluxdeploy", "generate", "--prompts", str(source)]
        command += ["--bundle", str(bundle), "--out", str(folder / "x.png")]
        start = time.perf_counter()
        made, seconds = [], []
        while len(made) < kills:
            began = time.perf_counter()
            # A moment: some pictures more than there are, and part of the next call.
            least = lines_of(index) + rng.randint(0, 2 * (count - lines_of(index)) // (kills + 1))
            if not kill_at(command, index, least, rng.uniform(0, 0.3)):
                sys.exit(f"The batch ended before it was killed {kills} times.")
            made.append(lines_of(index))
            seconds.append(round(time.perf_counter() - began, 2))
            click.echo(f"killed after {seconds[-1]} s, with {made[-1]} pictures")
        kill_at(command, index, count + 1)
        total = time.perf_counter() - start
        wrong = made_wrongly(folder, index, count)
        largest = largest_difference(bundle, folder, rows)
        result = {
            "prompts": count,
            "kills": kills,
            "pictures_at_each_kill": made,
            "seconds_to_each_kill": seconds,
            "seconds": round(total, 1),
            "pictures": len(list(folder.glob("*.png"))),
            "index_lines": lines_of(index),
            "wrong": wrong,
            "largest_difference_of_255": largest,
        }
    tell(result, report)


def tell(result: dict[str, Any], report: Path | None) -> NoReturn:
    """Print what was found and on what, write it to `report`, and exit with 1 where it is wrong."""
    machine = {"processor": describe_cpu()["name"] or platform.processor(), "cores": os.cpu_count()}
    text = json.dumps(machine | result, indent=2) + "\n"
    click.echo(text, nl=False)
    if report is not None:
        report.write_text(text, encoding="utf-8")
    sys.exit(bool(result["wrong"]) or result["largest_difference_of_255"] > 1)


if __name__ == "__main__":
    main()
