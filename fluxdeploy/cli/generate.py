"""`fluxdeploy generate`: a picture from a prompt."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxdeploy import __version__
from fluxdeploy.cli.options import AS_JSON, BUNDLE, RUNTIME, THREADS
from fluxdeploy.errors import UsageError
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluxdeploy.pipeline import FluxPipeline


@click.command()
@click.argument("prompt")
@BUNDLE
@click.option("--negative-prompt", help="What to steer away from; needs --true-cfg-scale.")
@click.option(
    "--true-cfg-scale",
    type=float,
    default=1.0,
    help="Strength of the negative prompt; above 1 each step costs twice.",
)
@click.option("--width", type=int, help="Pixels, a multiple of 16.  [default: the bundle's]")
@click.option("--height", type=int, help="Pixels, a multiple of 16.  [default: the bundle's]")
@click.option("--steps", type=int, help="Denoising steps.  [default: the bundle's]")
@click.option(
    "--guidance",
    type=float,
    help="Guidance scale of models with a guidance embedding.  [default: the bundle's]",
)
@click.option(
    "--seed", type=int, help="The same seed gives the same picture.  [default: a random one]"
)
@click.option("--num-images", type=click.IntRange(min=1), default=1, help="Pictures of the prompt.")
@click.option(
    "--max-sequence-length",
    type=int,
    help="T5 tokens that the prompt is padded or cut to.  [default: the bundle's]",
)
@RUNTIME
@THREADS
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="image.png",
    help="A PNG; several pictures become image-0.png, image-1.png, ...",
)
@AS_JSON
def command(
    prompt: str,
    bundle: Path,
    negative_prompt: str | None,
    true_cfg_scale: float,
    width: int | None,
    height: int | None,
    steps: int | None,
    guidance: float | None,
    seed: int | None,
    num_images: int,
    max_sequence_length: int | None,
    runtime: str,
    threads: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Make a picture from PROMPT.

    Runs a bundle's engines from NumPy: no PyTorch is needed. The prompt, the seed, the steps and
    the bundle's hash are written into the PNG, so that `inspect` can tell how a picture was made;
    the same bundle, seed and options make it again.

    \b
    Examples:
      fluxdeploy generate "a red circle above a blue square"
      fluxdeploy generate "a lighthouse at dusk" --bundle flux-dev --width 1024 --height 768
      fluxdeploy generate "a fox" --seed 7 --num-images 4 --out fox.png --json
    """
    from fluxdeploy.images import PictureMetadata, picture_paths, save_picture

    paths = picture_paths(out, num_images)
    _check_writable(paths)

    from engines.base import EngineOptions
    from fluxdeploy.pipeline import FluxPipeline

    start = time.monotonic()
    options = EngineOptions(threads=threads)
    with (
        FluxPipeline.from_bundle(bundle, runtime=runtime, options=options) as pipe,
        Progress(quiet=as_json) as progress,
    ):
        defaults = pipe.bundle.manifest.defaults
        steps = defaults.num_inference_steps if steps is None else steps
        guidance = defaults.guidance_scale if guidance is None else guidance
        if max_sequence_length is None:
            max_sequence_length = defaults.max_sequence_length
        # The pictures' decoding is the last unit.
        task = progress.task("Generating", total=max(steps, 0) + 1)

        def on_step_end(
            pipe: FluxPipeline, step: int, timestep: float, state: Mapping[str, Any]
        ) -> None:
            task.advance()

        result = pipe(
            prompt,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            num_images_per_prompt=num_images,
            seed=seed,
            max_sequence_length=max_sequence_length,
            callback_on_step_end=on_step_end,
        )
        task.advance()
        bundle_hash = pipe.bundle.content_hash
    assert isinstance(result.images, list)  # output_type is "pil"

    for index, (image, path) in enumerate(zip(result.images, paths, strict=True)):
        metadata = PictureMetadata(
            prompt=prompt,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
            seed=result.seed,
            index=index,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=max_sequence_length,
            height=image.height,
            width=image.width,
            bundle_hash=bundle_hash,
            fluxdeploy_version=__version__,
        )
        save_picture(image, path, metadata)
    seconds = time.monotonic() - start
    width, height = result.images[0].size
    if as_json:
        report = {
            "paths": [str(path) for path in paths],
            "seed": result.seed,
            "width": width,
            "height": height,
            "steps": steps,
            "seconds": round(seconds, 3),
        }
        click.echo(json.dumps(report))
        return
    for path in paths:
        click.echo(path)
    click.echo(f"{width}x{height}, seed {result.seed}, {steps} steps, {seconds:.1f} s", err=True)


def _check_writable(paths: list[Path]) -> None:
    """Find out before the long work whether the pictures can be written.

    Raises `UsageError` for a place that cannot hold a picture, `PermissionError` for one that may
    not.
    """
    for path in paths:
        if path.is_dir():
            raise UsageError(f"--out {path} is a folder. Name a PNG file in it.")
    folder = paths[0].parent
    if not folder.is_dir():
        raise UsageError(f"--out is in {folder}, which is not a folder. Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
