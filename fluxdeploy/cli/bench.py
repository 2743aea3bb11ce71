"""`fluxdeploy bench`: how fast bundles are here, and how fast others are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxdeploy.bench.job import PEERS
from fluxdeploy.cli.options import (
    AS_JSON,
    CHECKPOINT_NAME,
    DEVICE,
    FILE,
    FOLDER,
    RUNTIME,
    SIZE,
    complete_peer,
)
from fluxdeploy.errors import UsageError
from fluxdeploy.interrupts import INTERRUPTED
from fluxdeploy.library_output import libraries_on_stderr
from fluxdeploy.progress import Progress
from fluxdeploy.terminal import say, say_json, show

if TYPE_CHECKING:
    from fluxdeploy.bench.report.record import BenchReport


@click.command()
@click.option(
    "--bundle",
    "bundles",
    type=FOLDER,
    multiple=True,
    default=("bundle",),
    help="A folder that `build` wrote. May be given several times: all of them are timed.",
)
@click.option(
    "--against",
    metavar="PEER,...",
    shell_complete=complete_peer,
    help=f"Time others with the same weights too: {', '.join(PEERS)}. Ratios are then those to "
    "the first of them, else to the first bundle.",
)
@click.option(
    "--checkpoint",
    type=CHECKPOINT_NAME,
    help="What the bundles were made from, for peers that read it.  [default: the package's own "
    "where the bundle was made from it]",
)
@click.option("--size", type=SIZE, metavar="WxH", help="The picture.  [default: the bundle's]")
@click.option(
    "--steps", type=click.IntRange(min=1), help="Denoising steps.  [default: the bundle's]"
)
@click.option(
    "--batch", type=click.IntRange(min=1, max=64), default=1, help="Pictures in one call."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=10,
    help="In each round, every contender draws once.",
)
@click.option(
    "--warmup", type=click.IntRange(min=0), default=2, help="Rounds before the timed ones."
)
@click.option(
    "--cold-starts",
    type=click.IntRange(min=0),
    default=3,
    help="New processes that are timed until their first picture is saved.",
)
@click.option(
    "--one-by-one",
    is_flag=True,
    help="Start a contender anew for each turn, where memory is too small for all of them.",
)
@RUNTIME
@DEVICE
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads, the same number for every contender.  [default: all of the machine]",
)
@click.option(
    "--plot",
    type=FILE,
    metavar="FILE",
    help="Draw a PNG.",
)
@click.option(
    "--html",
    type=FILE,
    metavar="FILE",
    help="Write one page that needs no other file.",
)
@AS_JSON
def command(
    bundles: tuple[Path, ...],
    against: str | None,
    checkpoint: str | None,
    size: tuple[int, int] | None,
    steps: int | None,
    batch: int,
    rounds: int,
    warmup: int,
    cold_starts: int,
    one_by_one: bool,
    runtime: str,
    device: int,
    threads: int | None,
    plot: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Time bundles, and other ways to run the same model.

    Draws one picture again and again. Each contender has a process of its own, and they take
    turns: a ratio is one of neighbours in time, and its spread is told with it, like that of a
    contender to itself. Times of every component, of a step, of whole pictures and of cold starts;
    memory, and energy where a GPU counts it. Before anything is timed, the contenders' pictures
    are compared: one that draws something else is refused.

    Ctrl-C while contenders are timed ends the benchmark early: what the finished rounds gave is
    shown and written all the same, and the exit code is 130.

    \b
    Examples:
      fluxdeploy bench
      fluxdeploy bench --against eager,eager-bf16 --html bench.html
      fluxdeploy bench --json > bench.json
      fluxdeploy bench --bundle bundle --bundle bundle-int8 --plot bench.png
      fluxdeploy bench --bundle flux-dev --checkpoint ./FLUX.1-dev --against compile-bf16
    """
    from fluxdeploy.bench.choose import BenchRequest, choose_contenders, parse_peers
    from fluxdeploy.bench.measure import Counts, run_bench
    from fluxdeploy.bench.report.page import write_page
    from fluxdeploy.bench.report.plot import plot_bench
    from fluxdeploy.bench.report.record import to_json
    from fluxdeploy.verify.plot import check_plot

    peers = parse_peers(against) if against is not None else ()
    if html is not None and not html.parent.is_dir():
        raise UsageError(f"--html {html} cannot be written: give a file in a folder that exists.")
    if plot is not None:
        check_plot(plot)
    request = BenchRequest(bundles, peers, checkpoint, runtime, size, steps, batch, threads, device)
    with libraries_on_stderr(), Progress(quiet=as_json) as progress:
        contenders, noise = choose_contenders(request, progress)
        baseline = peers[0] if peers else contenders[0].name
        counts = Counts(rounds, warmup, cold_starts, one_by_one)
        report = run_bench(contenders, baseline, noise, counts, progress)
    if as_json:
        say_json(json.loads(to_json(report)), indent=2)
    else:
        _show(report)
    if plot is not None:
        plot_bench(report, plot)
    if html is not None:
        write_page(report, html)
    if report.rounds < rounds or report.cold_starts < cold_starts:
        say(
            f"Interrupted after {report.rounds} of {rounds} rounds and {report.cold_starts} of "
            f"{cold_starts} cold starts; the figures are theirs.",
            err=True,
        )
        raise click.exceptions.Exit(INTERRUPTED)


def _show(report: BenchReport) -> None:
    from rich.table import Table

    from fluxdeploy.bench.report.tables import describe_machine_in_words, make_tables, notes

    for text in make_tables(report):
        table = Table(title=text.title, title_justify="left", box=None, pad_edge=False)
        for index, heading in enumerate(text.headings):
            table.add_column(heading, justify="right" if index else "left", overflow="fold")
        for row in text.rows:
            table.add_row(*row)
        show(table, "")
    show(*notes(report), describe_machine_in_words(report))
