"""What a preview of each step costs, and how near it comes to the picture.

`python benchmarks/previews.py BUNDLE --json benchmarks/results/previews.json`
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from fluxdeploy import FluxPipeline
from fluxdeploy.demo.scenes import caption, sample_scene
from fluxdeploy.host.previews import linear_pictures, require_linear
from fluxdeploy.machine import describe_cpu
from fluxdeploy.sampling.latents import token_grid
from fluxdeploy.similarity import psnr

STEPS = 28


def draw(pipe: FluxPipeline, **more: Any) -> tuple[float, Any]:
    """Seconds of the steps of a call with all decoding, and its pictures, [B, H, W, 3]."""
    output = pipe(num_inference_steps=STEPS, output_type="np", **more)
    return output.seconds["denoising"] + output.seconds["decoding"], output.images


def shrunk(picture: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """The mean of each square of factor x factor pixels."""
    height, width, _ = picture.shape
    squares = picture.reshape(height // factor, factor, width // factor, factor, 3)
    return squares.mean(axis=(1, 3))


def linear_ms(pipe: FluxPipeline, side: int) -> float:
    """Milliseconds of the map itself, at best, over a picture of side x side pixels."""
    spec, linear = pipe.bundle.manifest.latents, require_linear(pipe.bundle.manifest)
    rows, columns = token_grid(side, side, spec)
    shape = (1, rows * columns, spec.channels * spec.patch_size**2)
    tokens = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        linear_pictures(tokens, side, side, spec, linear)
        seconds.append(time.perf_counter() - start)
    return round(min(seconds) * 1000, 2)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), default=10, help="Of timed pictures.")
@click.option("--pictures", type=click.IntRange(min=1), default=40, help="That are compared.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Where to write figures.")
def main(bundle: Path, rounds: int, pictures: int, report: Path | None) -> None:
    """Time, and compare."""
    times: dict[str, list[float]] = {"plain": [], "linear": [], "vae": []}
    with FluxPipeline.from_bundle(bundle) as pipe:
        factor = pipe.bundle.manifest.latents.spatial_factor
        seen: list[Any] = []
        watch = {"callback_on_preview": lambda caller, steps, images: seen.append(images)}
        ways: dict[str, dict[str, Any]] = {
            "plain": {},
            "linear": {**watch, "preview_decoder": "linear"},
            "vae": {**watch, "num_previews": STEPS - 1},
        }
        pipe.warm_up()
        for number in range(rounds):
            for name, more in ways.items():
                seconds, _ = draw(
                    pipe, prompt="a red circle above a blue square", seed=number, **more
                )
                times[name].append(seconds)
        rng = np.random.default_rng(0)
        last, halfway = [], []
        for number in range(pictures):
            seen.clear()
            prompt = caption(sample_scene(rng))
            _, (picture,) = draw(pipe, prompt=prompt, seed=number, **ways["linear"])
            small = shrunk(picture, factor)
            last.append(psnr(seen[-1][0], small))
            halfway.append(psnr(seen[STEPS // 2 - 1][0], small))
        per_step = {name: round(min(found) / STEPS * 1000, 3) for name, found in times.items()}
        result = {
            "processor": describe_cpu()["name"] or platform.processor(),
            "cores": os.cpu_count(),
            "bundle": str(pipe.bundle.manifest.provenance["checkpoint"]["name"]),  # type: ignore[index]
            "steps": STEPS,
            "rounds": rounds,
            "step_ms": per_step,
            "linear_map_ms": {str(side): linear_ms(pipe, side) for side in (128, 1024, 2048)},
            "pictures": pictures,
            "psnr_of_the_last_step": {
                "median": round(statistics.median(last), 1),
                "least": round(min(last), 1),
            },
            "psnr_halfway": {
                "median": round(statistics.median(halfway), 1),
                "least": round(min(halfway), 1),
            },
        }
    text = json.dumps(result, indent=2) + "\n"
    click.echo(text, nl=False)
    if report is not None:
        report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
