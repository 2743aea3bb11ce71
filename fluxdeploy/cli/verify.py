"""`fluxdeploy verify`: a bundle held against PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxdeploy.cli.options import (
    AS_JSON,
    BASE,
    BUNDLE,
    CHECKPOINT_NAME,
    DEVICE,
    FILE,
    LORAS,
    PROMPTS,
    REPORT,
    RUNTIME,
    THREADS,
)
from fluxdeploy.library_output import libraries_on_stderr
from fluxdeploy.lora import LoraFile
from fluxdeploy.progress import Progress
from fluxdeploy.terminal import say_json, show

if TYPE_CHECKING:
    from rich.table import Table

    from fluxdeploy.verify.layers import LayersReport
    from fluxdeploy.verify.pictures import PicturesReport
    from fluxdeploy.verify.verify import VerifyReport

_WORST = 5


@click.command()
@BUNDLE
@click.option(
    "--checkpoint",
    type=CHECKPOINT_NAME,
    help="What the bundle was made from: compares pictures and layers with PyTorch float32 too.",
)
@BASE
@click.option(
    "--pictures",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of pictures, each of its own seed.  [default: 1, where PyTorch and the checkpoint "
    "are at hand]",
)
@click.option(
    "--plot",
    type=FILE,
    metavar="FILE",
    help="Draw how pictures and layers spread, with their thresholds, into this PNG file.",
)
@LORAS
@PROMPTS
@REPORT
@RUNTIME
@DEVICE
@THREADS
@AS_JSON
def command(
    bundle: Path,
    checkpoint: str | None,
    base: Path | None,
    pictures: int | None,
    plot: Path | None,
    loras: tuple[LoraFile, ...],
    prompts: Path | None,
    page: Path | None,
    runtime: str,
    device: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Check a bundle against PyTorch.

    Hashes every file, runs every engine on the bundle's golden tensors and compares it with what
    PyTorch gave in float32. With the checkpoint, pictures of the same seeds are drawn with the
    bundle and with PyTorch, and the noise of every quantized linear of the transformer is measured;
    the checkpoints that come with the package are at hand where PyTorch is installed, and their
    pictures are also held against their prompts. Exits with 1 where a figure is past its gate,
    which the manifest holds.

    \b
    Examples:
      fluxdeploy verify
      fluxdeploy verify --pictures 50 --plot quality.png
      fluxdeploy verify --pictures 4 --report quality.html
      fluxdeploy verify --bundle flux-dev --checkpoint ./FLUX.1-dev
      fluxdeploy verify --bundle flux-rtx --runtime emulate
      fluxdeploy verify --json | jq .pictures.psnr.median
    """
    from engines import EngineOptions, choose_edition
    from fluxdeploy.bundle import open_bundle
    from fluxdeploy.verify.page import check_page, write_page
    from fluxdeploy.verify.plot import check_plot, plot_quality
    from fluxdeploy.verify.verify import verify

    if plot is not None:
        check_plot(plot)
        pictures = pictures or 1
    if page is not None:
        check_page(page)
    given = read_prompts(prompts)
    options = EngineOptions(threads, device)
    with libraries_on_stderr(), Progress(quiet=as_json) as progress:
        report = verify(
            bundle, checkpoint, runtime, options, progress, pictures, given, loras, base
        )
    if plot is not None:
        plot_quality(report, plot)
    if page is not None:
        write_page(report, choose_edition(open_bundle(bundle), runtime), page)
    if as_json:
        say_json(report.as_json())
    else:
        show_report(report)
    if not report.passed:
        raise SystemExit(1)


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """The prompts of a file, none where there is none. Raises `UsageError` for a bad file."""
    if path is None:
        return ()
    from exporters.calibrate.range_file import read_prompts

    return read_prompts(path)


def show_report(report: VerifyReport) -> None:
    """A verification in tables."""
    show(*_tables(report))
    if report.emulated:
        who: dict[str, list[str]] = {}
        for component in report.components:
            if component.emulated:
                who.setdefault(component.precision, []).append(component.name)
        emulated = "; ".join(f"{what} in {', '.join(names)}" for what, names in who.items())
        show(
            f"Emulated on this CPU are {emulated}: the numbers are those of the precision, the "
            "speed is not."
        )
    if report.pictures is None:
        show(
            "No pictures were compared: that takes --checkpoint, PyTorch, and --lora for each LoRA "
            "that was merged."
        )


def _tables(report: VerifyReport) -> Iterator[Table]:
    from rich.table import Table

    # Of a picture, where some were drawn.
    seconds = {} if report.pictures is None else report.pictures.seconds
    timed = ("s",) if seconds else ()
    table = Table("component", "precision", "error", "cosine", "dB", "MiB", *timed, "gate")
    for row in report.components:
        taken = (f"{seconds[row.name]:.2f}" if row.name in seconds else "",) if seconds else ()
        table.add_row(
            row.name,
            row.precision,
            f"{row.deviation.max_error:.1e}",
            f"{row.deviation.cosine:.6f}",
            f"{row.deviation.psnr:.0f}",
            f"{row.size / 2**20:.1f}",
            *taken,
            _verdict(row.passed),
        )
    yield table
    if report.layers is not None:
        yield _layers_table(report.layers)
    if report.pictures is not None:
        yield _pictures_table(report.pictures)


def _layers_table(report: LayersReport) -> Table:
    from rich.table import Table

    title = f"The worst of {len(report.sqnr)} quantized layers"
    table = Table("layer", "SQNR", "required", "gate", title=title, title_justify="left")
    required = "" if report.min_sqnr is None else f"{report.min_sqnr:g} dB"
    for name, ratio in report.worst(_WORST):
        passed = report.min_sqnr is None or ratio >= report.min_sqnr
        table.add_row(name, f"{ratio:.1f} dB", required, _verdict(passed))
    return table


def _pictures_table(report: PicturesReport) -> Table:
    from rich.table import Table

    from fluxdeploy.verify.pictures import OBJECTS_PICTURES

    count = len(report.pictures)
    pictures = "A picture" if count == 1 else f"{count} pictures"
    title = f"{pictures} of {report.width}x{report.height} in {report.steps} steps"
    table = Table("", "min", "median", "max", "required", "gate", title=title, title_justify="left")
    psnrs = [picture.psnr for picture in report.pictures]
    spread = [f"{value:.1f} dB" for value in (min(psnrs), report.psnr, max(psnrs))]
    table.add_row("PSNR", *spread, f"{report.gate.min_psnr:g} dB", _verdict(report.psnr_passed))
    ssims = [picture.ssim for picture in report.pictures]
    spread = [f"{value:.3f}" for value in (min(ssims), report.ssim, max(ssims))]
    table.add_row("SSIM", *spread, f"{report.gate.min_ssim:g}", _verdict(report.ssim_passed))
    if report.objects is not None:
        share, expected = (f"{share:.0%}" for share in report.objects)
        # Of few pictures the share is told, and decides nothing.
        verdict = _verdict(report.objects_passed) if count >= OBJECTS_PICTURES else ""
        table.add_row("objects right", "", share, "", f"PyTorch: {expected}", verdict)
    return table


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"
