"""`fluxdeploy tune`: fewer evaluations of the transformer, with a promise."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from fluxdeploy.cli.options import AS_JSON, BUNDLE, DEVICE, RUNTIME, SIZE, THREADS, PathType
from fluxdeploy.errors import UsageError
from fluxdeploy.library_output import libraries_on_stderr
from fluxdeploy.progress import Progress
from fluxdeploy.terminal import say_json, show


@click.command()
@BUNDLE
@click.option(
    "--psnr",
    "wanted",
    type=click.FloatRange(10, 100),
    default=34.0,
    help="What every held-out picture keeps, in dB, against the same without skips.",
)
@click.option("--steps", type=click.IntRange(2, 10_000), help="Steps.  [default: the bundle's]")
@click.option("--size", type=SIZE, metavar="WxH", help="Of pictures.  [default: the bundle's]")
@click.option("--sampler", default="euler", help="euler, ab2 or dpmpp_2m.")
@click.option(
    "--prompts",
    type=PathType(exists=True, dir_okay=False),
    metavar="FILE",
    help="Prompts, one a line: every second one is held out.  [default: some of our own]",
)
@RUNTIME
@DEVICE
@THREADS
@AS_JSON
def command(
    bundle: Path,
    wanted: float,
    steps: int | None,
    size: tuple[int, int] | None,
    sampler: str,
    prompts: Path | None,
    runtime: str,
    device: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Find steps in which the transformer need not run.

    In a step that is skipped, the velocity is extrapolated from those before. Which steps, how many
    and by which order is searched for on some prompts, and decided on others, which are held out:
    each of their pictures keeps --psnr, or nothing is written. What was found goes into the
    bundle's manifest, for so many steps; `generate --skip auto` uses it. A building of the bundle
    leaves it out again.

    \b
    Examples:
      fluxdeploy tune
      fluxdeploy tune --bundle flux-dev --psnr 36 --steps 28 --prompts prompts.txt
    """
    from engines.base import EngineOptions
    from fluxdeploy.host.pipeline import FluxPipeline
    from fluxdeploy.verify.pictures import choose_prompts
    from fluxdeploy.verify.skips import find_skips, write_skips

    options = EngineOptions(threads, device)
    with (
        libraries_on_stderr(),
        FluxPipeline.from_bundle(bundle, runtime, options) as pipe,
        Progress(quiet=as_json) as progress,
    ):
        pipe.bundle.manifest.require_text_to_image("tune")
        defaults = pipe.bundle.manifest.defaults
        height, width = size or (defaults.height, defaults.width)
        steps = defaults.num_inference_steps if steps is None else steps
        given = _read(prompts) if prompts else choose_prompts(pipe.bundle, 8).prompts
        tuning = find_skips(
            pipe, given[::2], given[1::2], wanted, sampler, steps, height, width, progress
        )
        opened, record = pipe.bundle, tuning.record
    if record is not None:
        write_skips(opened, record)
    if as_json:
        say_json(asdict(tuning))
    elif record is None:
        show(
            f"Nothing was written: with one of {steps} steps skipped, a held-out picture keeps "
            f"{tuning.reached:.1f} dB, and {wanted:g} were asked for."
        )
    else:
        show(
            f"{len(record.steps)} of {steps} steps are skipped, of order {record.order}: "
            f"{', '.join(map(str, record.steps))}. {record.pictures} held-out pictures keep "
            f"{record.psnr:.1f} dB or more. Use them with `generate --skip auto`."
        )
    if record is None:
        raise SystemExit(1)


def _read(path: Path) -> tuple[str, ...]:
    """The prompts of a file, one a line. Raises `UsageError` where there are fewer than two."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text. Give a file with a prompt a line.") from None
    found = tuple(line.strip() for line in lines if line.strip())
    if len(found) < 2:
        raise UsageError(
            f"{path} has {len(found)} prompts. Two at least are needed: one to search with, and "
            "one that is held out."
        )
    return found
