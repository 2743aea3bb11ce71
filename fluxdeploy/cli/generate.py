"""`fluxdeploy generate`: pictures from prompts."""

from __future__ import annotations

import errno
import functools
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import click

from fluxdeploy import __version__
from fluxdeploy.cli.options import (
    AS_JSON,
    BUNDLE,
    CALL_LORAS,
    DEVICE,
    RUNTIME,
    THREADS,
    PathType,
    complete_sampler,
)
from fluxdeploy.errors import (
    CutPromptWarning,
    UnmeasuredSkipsWarning,
    UnusedArgumentWarning,
    UsageError,
)
from fluxdeploy.library_output import libraries_on_stderr
from fluxdeploy.progress import Progress
from fluxdeploy.terminal import say, say_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

    from fluxdeploy.host.pipeline import FluxPipeline
    from fluxdeploy.lora import LoraFile


class _Margins(click.ParamType):  # type: ignore[type-arg]
    """Pixels on four sides: left, top, right, bottom."""

    name = "margins"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if re.fullmatch(r"\d{1,5}(\s*,\s*\d{1,5}){3}", value.strip()) is None:
            self.fail(
                f"{value!r} is not LEFT,TOP,RIGHT,BOTTOM in pixels, such as 64,0,64,0.", param, ctx
            )
        return tuple(int(number) for number in value.split(","))


class _Seeds(click.ParamType):  # type: ignore[type-arg]
    """One seed, or several with commas between."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if re.fullmatch(r"\s*-?\d{1,30}\s*(,\s*\d{1,30}\s*)*", value) is None:
            self.fail(f"{value!r} is not a seed, such as 7, or several, such as 1,2,3.", param, ctx)
        return tuple(int(number) for number in value.split(","))


class _Skip(click.ParamType):  # type: ignore[type-arg]
    """`none`, `auto`, or numbers of steps."""

    name = "skip"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = value.strip()
        if text in ("none", "auto"):
            return text
        if re.fullmatch(r"\d{1,5}(\s*,\s*\d{1,5})*", text) is None:
            self.fail(f"{value!r} is not none, auto or steps such as 3,5,7.", param, ctx)
        return tuple(int(number) for number in text.split(","))


def _joined(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


_KINDS = (CutPromptWarning, UnmeasuredSkipsWarning, UnusedArgumentWarning)


@click.command()
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@BUNDLE
@click.option(
    "--prompt-2",
    metavar="TEXT",
    help="What T5 reads instead of PROMPT, which is then CLIP's alone.",
)
@click.option("--negative-prompt", help="What to steer away from; needs --true-cfg-scale.")
@click.option(
    "--negative-prompt-2",
    metavar="TEXT",
    help="What T5 reads instead of --negative-prompt, which is then CLIP's alone.",
)
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
    "--seed",
    "seeds",
    type=_Seeds(),
    metavar="SEED[,SEED...]",
    help="The same seed gives the same picture. Several give pictures of each prompt, for each "
    "seed.  [default: a random one]",
)
@click.option(
    "--num-images", type=click.IntRange(min=1), default=1, help="Pictures of each prompt and seed."
)
@click.option(
    "--image",
    type=PathType(),
    help="A picture to start from, resized to width x height.",
)
@click.option(
    "--strength",
    type=float,
    help="How much of --image becomes noise, 0 to 1: that share of the steps is made.  "
    "[default: the bundle's]",
)
@click.option(
    "--mask",
    type=PathType(),
    help="What of --image to redraw, where it is white; where a mask has transparency, what is "
    "transparent instead.",
)
@click.option(
    "--mask-crop",
    type=click.IntRange(min=0),
    metavar="PIXELS",
    help="Draw only the part of --image around --mask, with so many pixels more on each side, and "
    "lay it over --image.",
)
@click.option(
    "--outpaint",
    type=_Margins(),
    metavar="LEFT,TOP,RIGHT,BOTTOM",
    help="Draw so many pixels more on the sides of --image. Width and height are then those of the "
    "whole, in multiples of 16.",
)
@click.option(
    "--max-sequence-length",
    type=int,
    help="T5 tokens that the prompt is padded or cut to.  [default: the bundle's]",
)
@click.option(
    "--sampler",
    default="euler",
    shell_complete=complete_sampler,
    help="How steps use the velocity: euler; ab2 or dpmpp_2m, of second order at the same cost; "
    "heun or midpoint, at twice the cost; rk4, at four times.",
)
@click.option(
    "--skip",
    type=_Skip(),
    default="none",
    metavar="none|auto|STEP,...",
    help="Steps in which the transformer does not run: auto takes those that `tune` has found.",
)
@CALL_LORAS
@RUNTIME
@DEVICE
@THREADS
@click.option(
    "--low-vram",
    is_flag=True,
    help="Open each engine only while it is needed: less memory, and more time to load.",
)
@click.option(
    "--out",
    type=PathType(),
    default="image.png",
    help="A PNG; several pictures become image-0.png, image-1.png, ...",
)
@click.option(
    "--sheet",
    type=PathType(),
    help="Also put all pictures with their prompts into this one PNG.",
)
@AS_JSON
def command(
    prompts: tuple[str, ...],
    bundle: Path,
    prompt_2: str | None,
    negative_prompt: str | None,
    negative_prompt_2: str | None,
    true_cfg_scale: float,
    width: int | None,
    height: int | None,
    steps: int | None,
    guidance: float | None,
    seeds: tuple[int, ...] | None,
    num_images: int,
    image: Path | None,
    strength: float | None,
    mask: Path | None,
    mask_crop: int | None,
    outpaint: tuple[int, ...] | None,
    max_sequence_length: int | None,
    sampler: str,
    skip: Literal["none", "auto"] | tuple[int, ...],
    loras: tuple[LoraFile, ...],
    runtime: str,
    device: int,
    threads: int | None,
    low_vram: bool,
    out: Path,
    sheet: Path | None,
    as_json: bool,
) -> None:
    """Make a picture of each PROMPT.

    Runs a bundle's engines from NumPy: no PyTorch is needed. The prompt, the seed, the steps and
    the bundle's hash are written into the PNG, so that `inspect` can tell how a picture was made;
    the same bundle, seed and options make it again. Each prompt begins with the same seed: its
    pictures do not depend on the other prompts. Several seeds are as many calls: each picture is
    the one that its seed alone gives.

    \b
    Examples:
      fluxdeploy generate "a red circle above a blue square"
      fluxdeploy generate "a lighthouse at dusk" --bundle flux-dev --width 1024 --height 768
      fluxdeploy generate "a fox" --seed 7 --num-images 4 --out fox.png --json
      fluxdeploy generate "a fox" --seed 1,2,3 --sheet seeds.png
      fluxdeploy generate "a green star" "a pink heart" --sheet sheet.png
      fluxdeploy generate "a fox" --bundle flux-dev --lora style.safetensors:0.8
      fluxdeploy generate "a fox, oil on canvas" --image fox.png --strength 0.7
      fluxdeploy generate "a blue heart" --image ring.png --mask hole.png --strength 0.9
      fluxdeploy generate "a red ring" --image ring.png --outpaint 64,0,64,0 --strength 1
    """
    from fluxdeploy.host.pictures import PictureMetadata, picture_paths, save_picture, write_png
    from fluxdeploy.host.sheet import contact_sheet

    # A call of its own for each seed: then any picture can be made again without the others.
    runs = [(prompt, seed) for prompt in prompts for seed in seeds or (None,)]
    captions = [prompt for prompt, _ in runs for _ in range(num_images)]
    several = None
    if seeds is not None and len(seeds) > 1:
        several = [seed for seed in seeds for _ in range(num_images)] * len(prompts)
    paths = picture_paths(out, len(captions), several)
    _check_writable("--out", paths)
    if sheet is not None:
        _check_sheet(sheet, paths)

    from fluxdeploy.host.input_images import open_image, open_mask
    from fluxdeploy.host.outpainting import outpaint_canvas

    given, image_sha256 = (None, None) if image is None else open_image(image)
    marked, mask_sha256 = (None, None) if mask is None else open_mask(mask)
    if outpaint is not None:
        if given is None or marked is not None:
            raise UsageError("--outpaint needs --image, and makes the mask: leave out --mask.")
        given, marked = outpaint_canvas(given, *outpaint)
        width = given.width if width is None else width
        height = given.height if height is None else height

    from engines.base import EngineOptions
    from fluxdeploy.host.loras import describe_loras
    from fluxdeploy.host.pipeline import FluxPipeline
    from fluxdeploy.sampling.noise import check_seed
    from fluxdeploy.sampling.noising import first_step

    for each in seeds or ():
        check_seed(each)
    described = describe_loras(loras) if loras else None
    start = time.monotonic()
    options = EngineOptions(threads, device)
    with (
        libraries_on_stderr(),
        FluxPipeline.from_bundle(bundle, runtime, options, low_vram) as pipe,
        Progress(quiet=as_json) as progress,
        _notices(progress, as_json) as warned,
    ):
        defaults = pipe.bundle.manifest.defaults
        steps = defaults.num_inference_steps if steps is None else steps
        if max_sequence_length is None:
            max_sequence_length = defaults.max_sequence_length
        share = defaults.strength if strength is None else strength
        made = steps if given is None else steps - first_step(steps, share)
        # The decoding of a prompt's pictures is its last unit.
        task = progress.task("Generating", total=len(runs) * (max(made, 0) + 1))

        def on_step_end(
            pipe: FluxPipeline, step: int, timestep: float, state: Mapping[str, Any]
        ) -> None:
            task.advance()

        images: list[Image] = []
        used: list[int] = []
        drawn: int | None = None
        for prompt, seed in runs:
            result = pipe(
                prompt,
                prompt_2=prompt_2,
                negative_prompt=negative_prompt,
                negative_prompt_2=negative_prompt_2,
                true_cfg_scale=true_cfg_scale,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                num_images_per_prompt=num_images,
                seed=drawn if seed is None else seed,
                image=given,
                mask_image=marked,
                strength=strength,
                padding_mask_crop=mask_crop,
                max_sequence_length=max_sequence_length,
                sampler=sampler,
                skip=skip,
                lora=loras,
                callback_on_step_end=on_step_end,
            )
            task.advance()
            assert isinstance(result.images, list)  # output_type is "pil"
            images += result.images
            assert isinstance(result.seed, int)
            drawn = result.seed
            used += [result.seed] * num_images
        bundle_hash = pipe.bundle.content_hash

    for number, (picture, caption, path) in enumerate(zip(images, captions, paths, strict=True)):
        metadata = PictureMetadata(
            prompt=caption,
            prompt_2=prompt_2,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            true_cfg_scale=true_cfg_scale,
            seed=used[number],
            index=number % num_images,
            num_inference_steps=steps,
            guidance_scale=defaults.guidance_scale if guidance is None else guidance,
            sampler=None if sampler == "euler" else sampler,
            skip=None if skip == "none" else skip if isinstance(skip, str) else _joined(skip),
            max_sequence_length=max_sequence_length,
            height=defaults.height if height is None else height,
            width=defaults.width if width is None else width,
            strength=None if given is None else share,
            image_sha256=image_sha256,
            mask_sha256=mask_sha256,
            padding_mask_crop=None if marked is None else mask_crop,
            outpaint=None if outpaint is None else _joined(outpaint),
            bundle_hash=bundle_hash,
            fluxdeploy_version=__version__,
            loras=described,
        )
        save_picture(picture, path, metadata)
    if sheet is not None:
        write_png(contact_sheet(images, captions), sheet)
    seconds = time.monotonic() - start
    width, height = images[0].size
    if as_json:
        report = {
            "paths": [str(path) for path in paths],
            "prompts": captions,
            "sheet": None if sheet is None else str(sheet),
            "seed": used[0] if len(set(used)) == 1 else None,
            "seeds": used,
            "width": width,
            "height": height,
            "steps": steps,
            "seconds": round(seconds, 3),
            "warnings": warned,
        }
        say_json(report)
        return
    for path in paths if sheet is None else (*paths, sheet):
        say(str(path))
    counted = f"{steps} steps" if given is None else f"{made} of {steps} steps"
    told = ", ".join(map(str, dict.fromkeys(used)))
    say(f"{width}x{height}, seed {told}, {counted}, {seconds:.1f} s", err=True)


@contextmanager
def _notices(progress: Progress, as_json: bool) -> Iterator[list[str]]:
    """Tell of options that do nothing and of prompts that are cut, a line each on stderr.

    Gives the list of them, which grows.
    """
    note = functools.partial(say, err=True) if as_json else progress.note
    told: list[str] = []
    with warnings.catch_warnings():
        for kind in _KINDS:
            warnings.simplefilter("always", kind)
        show = warnings.showwarning

        def tell(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, _KINDS):
                show(message, category, filename, lineno, file, line)
            elif str(message) not in told:
                told.append(str(message))
                note(f"Warning: {message}")

        warnings.showwarning = tell
        yield told


def _check_sheet(sheet: Path, paths: list[Path]) -> None:
    """Raise `UsageError` or `PermissionError` where a contact sheet cannot be written."""
    from fluxdeploy.host.pictures import check_picture_path

    check_picture_path(sheet)
    _check_writable("--sheet", [sheet])
    if os.path.realpath(sheet) in map(os.path.realpath, paths):
        raise UsageError(f"--sheet {sheet} is also the name of a picture. Name another file.")


def _check_writable(option: str, paths: list[Path]) -> None:
    """Find out before the long work whether the files of an option can be written.

    Raises `UsageError` for a place that cannot hold a picture, `PermissionError` for one that may
    not.
    """
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{option} {path} is a folder. Name a PNG file in it.")
    folder = paths[0].parent
    if not folder.is_dir():
        raise UsageError(f"{option} is in {folder}, which is not a folder. Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
