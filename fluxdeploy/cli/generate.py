"""`fluxdeploy generate`: pictures from prompts."""

from __future__ import annotations

import errno
import functools
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import click

from fluxdeploy.cli.grid import (
    GRID_SHEET,
    AxisType,
    check_grid,
    place_of_pictures,
    read_pictures,
    report_grid,
    write_grid,
)
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
from fluxdeploy.cli.previews import TERMINAL, check_terminal, to_file, to_terminal
from fluxdeploy.errors import (
    CutPromptWarning,
    FluxDeployError,
    TiledWarning,
    UnmeasuredSkipsWarning,
    UnusedArgumentWarning,
    UsageError,
)
from fluxdeploy.interrupts import interrupted
from fluxdeploy.library_output import libraries_on_stderr
from fluxdeploy.progress import Progress
from fluxdeploy.terminal import say, say_json

if TYPE_CHECKING:
    from fluxdeploy.batch.draw import OnPreview
    from fluxdeploy.batch.grid import Axis
    from fluxdeploy.batch.jobs import Job
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


_KINDS = (CutPromptWarning, TiledWarning, UnmeasuredSkipsWarning, UnusedArgumentWarning)


@click.command()
@click.argument("prompts", metavar="PROMPT...", nargs=-1)
@click.option(
    "--prompts",
    "source",
    metavar="FILE",
    help="Many pictures: JSON lines, a table with commas, or a prompt a line, in a file or, with "
    "-, on standard input. What is there already is not drawn again.",
)
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
    "images",
    type=PathType(),
    multiple=True,
    help="A picture to start from, resized to width x height; for a Kontext bundle the picture to "
    "change, or several.",
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
    "--control-image",
    "control_images",
    type=PathType(),
    multiple=True,
    help="For a Canny or Depth bundle, or one with a ControlNet: the edges, depths and so on to "
    "draw along. Once for each of several ControlNets, in their order, as the next four options.",
)
@click.option(
    "--control-mode",
    "control_modes",
    type=int,
    multiple=True,
    metavar="N",
    help="The kind of control, for a ControlNet that tells several apart.",
)
@click.option(
    "--controlnet-scale",
    "controlnet_scales",
    type=float,
    multiple=True,
    help="How much a ControlNet counts.  [default: 1]",
)
@click.option(
    "--control-start",
    "control_starts",
    type=float,
    multiple=True,
    help="The part of the steps, 0 to 1, after which a ControlNet counts.  [default: 0]",
)
@click.option(
    "--control-end",
    "control_ends",
    type=float,
    multiple=True,
    help="The part of the steps, 0 to 1, after which it no longer does.  [default: 1]",
)
@click.option(
    "--ip-adapter-image",
    type=PathType(),
    help="For a bundle with an IP-Adapter: a picture that the result is to look like.",
)
@click.option(
    "--negative-ip-adapter-image",
    type=PathType(),
    help="The same beside --negative-prompt: what to steer away from.  [default: black]",
)
@click.option(
    "--ip-adapter-scale",
    "ip_adapter_scales",
    type=float,
    multiple=True,
    help="How much --ip-adapter-image counts: once for all double-stream blocks, or once for each."
    "  [default: 1]",
)
@click.option(
    "--control",
    type=click.Choice(["canny"]),
    help="Find the edges of --control-image first; needs the extra `control`.",
)
@click.option(
    "--redux-image",
    "redux_images",
    type=PathType(),
    multiple=True,
    help="For a bundle that was built with --redux: a picture to draw variations of, which stands "
    "behind the words of PROMPT, or several.",
)
@click.option(
    "--redux-scale",
    "redux_scales",
    type=float,
    multiple=True,
    help="How much PROMPT and --redux-image count: once for all pictures, or for each.  "
    "[default: 1]",
)
@click.option(
    "--redux-pooled-scale",
    "redux_pooled_scales",
    type=float,
    multiple=True,
    help="How much CLIP's embedding of PROMPT counts, likewise.  [default: 1]",
)
@click.option(
    "--max-area",
    type=int,
    metavar="PIXELS",
    help="For a Kontext bundle: draw so many pixels, in the proportions of width and height.",
)
@click.option(
    "--auto-resize/--no-auto-resize",
    default=None,
    help="Whether --image of a Kontext bundle becomes one of the sizes that the model was trained "
    "with.  [default: yes]",
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
@click.option(
    "--grid",
    "axes",
    multiple=True,
    type=AxisType(),
    metavar="NAME=VALUE,...",
    help="Compare: a picture for each value of an option (steps, seed, guidance, true-cfg-scale, "
    "strength, sampler), or of two, on one sheet. Twice gives rows and columns; several PROMPTs "
    "are rows too. The sheet is --sheet, grid.png by default; with --out all pictures are kept.",
)
@click.option(
    "--preview",
    type=PathType(),
    metavar="terminal|FILE",
    help="Show each step as a small picture of where it is going: on the terminal, or in a PNG "
    "that each step replaces.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Pictures of one size that --prompts draws at once.  [default: as many as pay]",
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS|local",
    help="Draw --prompts on a Ray cluster, a worker a device; `local` begins one here.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of --ray.  [default: one for each GPU, else for each machine]",
)
@AS_JSON
def command(
    prompts: tuple[str, ...],
    source: str | None,
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
    images: tuple[Path, ...],
    strength: float | None,
    mask: Path | None,
    mask_crop: int | None,
    outpaint: tuple[int, ...] | None,
    control_images: tuple[Path, ...],
    control_modes: tuple[int, ...],
    controlnet_scales: tuple[float, ...],
    control_starts: tuple[float, ...],
    control_ends: tuple[float, ...],
    ip_adapter_image: Path | None,
    negative_ip_adapter_image: Path | None,
    ip_adapter_scales: tuple[float, ...],
    control: str | None,
    redux_images: tuple[Path, ...],
    redux_scales: tuple[float, ...],
    redux_pooled_scales: tuple[float, ...],
    max_area: int | None,
    auto_resize: bool | None,
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
    axes: tuple[Axis, ...],
    preview: Path | None,
    batch: int | None,
    address: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Make a picture of each PROMPT.

    Runs a bundle's engines from NumPy: no PyTorch is needed. The prompt, the seed, the steps and
    the bundle's hash are written into the PNG, so that `inspect` can tell how a picture was made;
    the same bundle, seed and options make it again. Each prompt begins with the same seed: its
    pictures do not depend on the other prompts. Several seeds are as many calls: each picture is
    the one that its seed alone gives.

    With --prompts each line of a file may have its own size, seed, steps, image and so on, under
    the options' names; the options here are for lines that say nothing. Each picture is written
    when it is made, and entered in an index beside it: run the same command again to go on after
    Ctrl-C or a kill. A bad line is named, and the others are drawn.

    \b
    Examples:
      fluxdeploy generate "a red circle above a blue square"
      fluxdeploy generate "a lighthouse at dusk" --bundle flux-dev --width 1024 --height 768
      fluxdeploy generate "a fox" --seed 7 --num-images 4 --out fox.png --json
      fluxdeploy generate "a fox" --seed 1,2,3 --sheet seeds.png
      fluxdeploy generate "a green star" "a pink heart" --sheet sheet.png
      fluxdeploy generate "a fox" --grid seed=1,2,3 --grid steps=4,8,28 --sheet grid.png
      fluxdeploy generate "a fox" --bundle flux-dev --preview terminal
      fluxdeploy generate "a fox" --bundle flux-dev --lora style.safetensors:0.8
      fluxdeploy generate "a fox, oil on canvas" --image fox.png --strength 0.7
      fluxdeploy generate "a blue heart" --image ring.png --mask hole.png --strength 0.9
      fluxdeploy generate "a red ring" --image ring.png --outpaint 64,0,64,0 --strength 1
      fluxdeploy generate "make the ring blue" --bundle kontext --image ring.png
      fluxdeploy generate "a glass house" --bundle canny --control-image house.jpg --control canny
      fluxdeploy generate "in winter" --bundle dev-redux --redux-image house.jpg
      fluxdeploy generate --prompts prompts.jsonl --out pictures/fox.png
      fluxdeploy generate --prompts prompts.jsonl --bundle flux-dev --ray auto --out fox.png
    """
    usual = {
        "prompt_2": prompt_2,
        "negative_prompt": negative_prompt,
        "negative_prompt_2": negative_prompt_2,
        "true_cfg_scale": true_cfg_scale,
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "num_images_per_prompt": num_images,
        "seed": seeds,
        "image": images,
        "mask_image": mask,
        "strength": strength,
        "padding_mask_crop": mask_crop,
        "outpaint": outpaint,
        "control_image": control_images,
        "control": control,
        "control_mode": control_modes,
        "controlnet_conditioning_scale": controlnet_scales,
        "control_guidance_start": control_starts,
        "control_guidance_end": control_ends,
        "ip_adapter_image": ip_adapter_image,
        "negative_ip_adapter_image": negative_ip_adapter_image,
        "ip_adapter_scale": ip_adapter_scales,
        "redux_image": redux_images,
        "prompt_embeds_scale": redux_scales,
        "pooled_prompt_embeds_scale": redux_pooled_scales,
        "max_area": max_area,
        "auto_resize": auto_resize,
        "max_sequence_length": max_sequence_length,
        "sampler": sampler,
        "skip": skip,
        "lora": loras,
    }
    if (source is None) == (not prompts):
        raise click.UsageError("Give a PROMPT, or a file of them with --prompts.")
    if address is not None and (source is None or preview is not None):
        raise UsageError("--ray draws what --prompts has, without --preview: its steps are afar.")
    if axes:
        check_grid(axes, source)
        sheet = GRID_SHEET if sheet is None else sheet
        out = place_of_pictures(out)
    from engines.base import EngineOptions
    from fluxdeploy.batch.cluster import Cluster
    from fluxdeploy.batch.grid import make_grid
    from fluxdeploy.batch.index import Index
    from fluxdeploy.batch.lines import STDIN, read_lines
    from fluxdeploy.batch.plan import index_path, make_jobs, of_lines, of_prompts
    from fluxdeploy.batch.run import run_jobs
    from fluxdeploy.host.pipeline import FluxPipeline

    start = time.monotonic()
    bad: list[tuple[str, FluxDeployError]] = []
    said: set[tuple[str, str]] = set()

    def failed(place: str, error: FluxDeployError) -> None:
        if source is None:
            raise error
        if (place, str(error)) not in said:  # which several seeds of a line may share
            said.add((place, str(error)))
            bad.append((place, error))
            say(f"{place}: {error}", err=True)

    grid = make_grid(prompts, axes, usual, out) if axes else None
    if grid is not None:
        requests = grid.requests
    elif source is None:
        requests = of_prompts(prompts, usual, out)
    else:
        folder = Path() if source == STDIN else Path(source).parent
        requests = of_lines(read_lines(source), usual, out, folder, failed)
    paths = [path for request in requests for path in request.paths]
    _check_writable("--out", paths if source is None else [out, *paths])
    if sheet is not None:
        _check_beside("--sheet", sheet, paths)
    if preview == TERMINAL:
        check_terminal(as_json)
    elif preview is not None:
        _check_beside("--preview", preview, [*paths, *([] if sheet is None else [sheet])])

    options = EngineOptions(threads, device)
    with (
        libraries_on_stderr(),
        FluxPipeline.from_bundle(bundle, runtime, options, low_vram) as pipe,
        nullcontext() if source is None else Index(index_path(out)) as index,
        Progress(quiet=as_json) as progress,
        _notices(progress, as_json) as warned,
        ExitStack() as stack,
    ):
        on_preview = _previews(preview, pipe, progress)
        jobs = make_jobs(pipe, requests, index, failed)
        if source is not None:
            interrupted(resumes=True)
        # On the command line each prompt and seed is a call of its own.
        at_once = 1 if source is None else batch
        afar = None
        if address is not None and not all(job.done for job in jobs):
            afar = stack.enter_context(Cluster(address, pipe, runtime, options, low_vram, workers))
        run_jobs(pipe, jobs, index, failed, progress, at_once, on_preview, afar)
    written = [
        (path, job.order.prompt)
        for job in jobs
        for path in job.paths
        if index is None or index.find(path, job.request) is not None
    ]
    if grid is not None:
        assert sheet is not None
        write_grid(sheet, grid, written)
    elif sheet is not None and written:
        _write_sheet(sheet, written)
    seconds = time.monotonic() - start
    if grid is not None:
        assert sheet is not None
        report_grid(sheet, grid, jobs, seconds, warned, as_json)
    elif source is None:
        _report_prompts(jobs, sheet, seconds, warned, as_json)
    else:
        kept = sum(len(job.made) for job in jobs)
        paths = [path for path, _ in written]
        _report_lines(paths, kept, index_path(out), bad, seconds, warned, as_json)


def _previews(preview: Path | None, pipe: FluxPipeline, progress: Progress) -> OnPreview | None:
    """Who is shown each step. Raises `UsageError` for a bundle that cannot show any."""
    from fluxdeploy.host.previews import require_linear

    if preview is None:
        return None
    manifest = pipe.bundle.manifest
    require_linear(manifest)
    if preview == TERMINAL:
        return to_terminal(progress)
    return to_file(preview, manifest.latents.spatial_factor)


def _report_prompts(
    jobs: list[Job], sheet: Path | None, seconds: float, warned: list[str], as_json: bool
) -> None:
    from PIL import Image

    from fluxdeploy.sampling.noising import first_step

    order = jobs[0].order
    seeds = [job.order.seed for job in jobs for _ in job.paths]
    paths = [path for job in jobs for path in job.paths]
    steps = order.num_inference_steps
    assert steps is not None
    with Image.open(paths[0]) as image:
        width, height = image.size
    if as_json:
        report = {
            "paths": [str(path) for path in paths],
            "prompts": [job.order.prompt for job in jobs for _ in job.paths],
            "sheet": None if sheet is None else str(sheet),
            "seed": order.seed if len(set(seeds)) == 1 else None,
            "seeds": seeds,
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
    counted = f"{steps} steps"
    if order.strength is not None and order.image:
        counted = f"{steps - first_step(steps, order.strength)} of {steps} steps"
    told = ", ".join(map(str, dict.fromkeys(seeds)))
    say(f"{width}x{height}, seed {told}, {counted}, {seconds:.1f} s", err=True)


def _report_lines(
    paths: list[Path],
    kept: int,
    index: Path,
    bad: list[tuple[str, FluxDeployError]],
    seconds: float,
    warned: list[str],
    as_json: bool,
) -> None:
    """What became of a file; exits with 1 where a line could not be drawn."""
    if as_json:
        report = {
            "paths": [str(path) for path in paths],
            "index": str(index),
            "drawn": len(paths) - kept,
            "kept": kept,
            "failed": [{"place": place, "error": str(error)} for place, error in bad],
            "seconds": round(seconds, 3),
            "warnings": warned,
        }
        say_json(report)
    else:
        for path in paths:
            say(str(path))
        parts = [f"{len(paths) - kept} pictures drawn", *([f"{kept} were there"] if kept else [])]
        parts += [f"{len({place for place, _ in bad})} lines failed"] if bad else []
        say(f"{', '.join(parts)}, {seconds:.1f} s; the index is {index}", err=True)
    if bad:
        raise click.exceptions.Exit(1)


def _write_sheet(sheet: Path, written: list[tuple[Path, str]]) -> None:
    """Put pictures with their prompts into one."""
    from fluxdeploy.host.pictures import write_png
    from fluxdeploy.host.sheet import contact_sheet

    pictures = read_pictures([path for path, _ in written])
    write_png(contact_sheet(pictures, [prompt for _, prompt in written]), sheet)


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


def _check_beside(option: str, path: Path, paths: list[Path]) -> None:
    """Raise `UsageError` or `PermissionError` where a file cannot be written beside the others."""
    from fluxdeploy.host.pictures import check_picture_path

    check_picture_path(path)
    _check_writable(option, [path])
    if os.path.realpath(path) in map(os.path.realpath, paths):
        raise UsageError(f"{option} {path} is also the name of a picture. Name another file.")


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
