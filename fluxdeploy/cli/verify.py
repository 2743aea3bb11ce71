"""`fluxdeploy verify`: a bundle held against PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxdeploy.cli.options import AS_JSON, BUNDLE, RUNTIME, THREADS
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from fluxdeploy.verify import VerifyReport


@click.command()
@BUNDLE
@click.option(
    "--checkpoint",
    help="What the bundle was made from: compares a whole picture too, in PyTorch float32.",
)
@RUNTIME
@THREADS
@AS_JSON
def command(
    bundle: Path, checkpoint: str | None, runtime: str, threads: int | None, as_json: bool
) -> None:
    """Check a bundle against PyTorch.

    Hashes every file, runs every engine on the bundle's golden tensors and compares it with what
    PyTorch gave in float32. With the checkpoint, a picture drawn with PyTorch is compared too; the
    ones that come with the package are at hand where PyTorch is installed. Exits with 1 where a
    figure is past its gate.

    \b
    Examples:
      fluxdeploy verify
      fluxdeploy verify --bundle flux-dev --checkpoint ./FLUX.1-dev
      fluxdeploy verify --json | jq .picture.psnr
    """
    from engines import EngineOptions
    from fluxdeploy.verify import verify

    with Progress(quiet=as_json) as progress:
        report = verify(bundle, checkpoint, runtime, EngineOptions(threads=threads), progress)
    if as_json:
        click.echo(json.dumps(report.as_json()))
    else:
        _show(report)
    if not report.passed:
        raise SystemExit(1)


def _show(report: VerifyReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("component", "precision", "max error", "cosine", "PSNR", "gate")
    for row in report.components:
        table.add_row(
            row.name,
            row.precision,
            f"{row.deviation.max_error:.1e}",
            f"{row.deviation.cosine:.6f}",
            f"{row.deviation.psnr:.0f} dB",
            "passed" if row.passed else "FAILED",
        )
    picture = report.picture
    if picture is not None:
        table.add_row(
            "picture",
            "",
            f"{picture.max_difference:.2f}/255",
            "",
            f"{picture.psnr:.0f} dB",
            "passed" if picture.passed else "FAILED",
        )
    console = Console()
    console.print(table)
    if picture is None:
        console.print("No picture was compared: that takes --checkpoint, and PyTorch.")
