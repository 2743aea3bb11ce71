"""`fluxdeploy bench`: how fast bundles are here, and how fast others are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxdeploy.bench.job import PEERS
from fluxdeploy.cli.options import DEVICE, RUNTIME, parse_size
from fluxdeploy.errors import UsageError
from fluxdeploy.library_output import libraries_on_stderr
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from fluxdeploy.bench.report.record import BenchReport


@click.command()
@click.option(
    "--bundle",
    "bundles",
    type=click.Path(path_type=Path),
    multiple=True,
    default=("bundle",),
    help="A folder that `build` wrote. May be given several times: all of them are timed.",
)
@click.option(
    "--against",
    metavar="PEER,...",
    help=f"Time others with the same weights too: {', '.join(PEERS)}. Ratios are then those to "
    "the first of them, else to the first bundle.",
)
@click.option(
    "--checkpoint",
    help="What the bundles were made from, for peers that read it.  [default: the package's own "
    "where the bundle was made from it]",
)
@click.option(
    "--size", type=parse_size, metavar="WxH", help="The picture.  [default: the bundle's]"
)
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
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write all figures, with the machine's description.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw a PNG.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write one page that needs no other file.",
)
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
    json_file: Path | None,
    plot: Path | None,
    html: Path | None,
) -> None:
    """Time bundles, and other ways to run the same model.

    Draws one picture again and again. Each contender has a process of its own, and they take
    turns: a ratio is one of neighbours in time, and its spread is told with it, like that of a
    contender to itself. Times of every component, of a step, of whole pictures and of cold starts;
    memory, and energy where a GPU counts it. Before anything is timed, the contenders' pictures
    are compared: one that draws something else is refused.

    \b
    Examples:
      fluxdeploy bench
      fluxdeploy bench --against eager,eager-bf16 --json bench.json --html bench.html
      fluxdeploy bench --bundle bundle --bundle bundle-int8 --plot bench.png
      fluxdeploy bench --bundle flux-dev --checkpoint ./FLUX.1-dev --against compile-bf16
    """
    from fluxdeploy.bench.choose import BenchRequest, choose_contenders, parse_peers
    from fluxdeploy.bench.measure import Counts, run_bench
    from fluxdeploy.bench.report.page import write_page
    from fluxdeploy.bench.report.plot import plot_bench
    from fluxdeploy.bench.report.record import to_json
    from fluxdeploy.bundle.files import write_atomic
    from fluxdeploy.verify.plot import check_plot

    peers = parse_peers(against) if against is not None else ()
    for option, path in (("--json", json_file), ("--html", html)):
        if path is not None and not path.parent.is_dir():
            raise UsageError(
                f"{option} {path} cannot be written: give a file in a folder that exists."
            )
    if plot is not None:
        check_plot(plot)
    request = BenchRequest(bundles, peers, checkpoint, runtime, size, steps, batch, threads, device)
    with libraries_on_stderr(), Progress() as progress:
        contenders, noise = choose_contenders(request, progress)
        baseline = peers[0] if peers else contenders[0].name
        counts = Counts(rounds, warmup, cold_starts, one_by_one)
        report = run_bench(contenders, baseline, noise, counts, progress)
    _show(report)
    if json_file is not None:
        write_atomic(json_file, to_json(report))
    if plot is not None:
        plot_bench(report, plot)
    if html is not None:
        write_page(report, html)


def _show(report: BenchReport) -> None:
    from rich.console import Console
    from rich.table import Table

    from fluxdeploy.bench.report.tables import describe_machine_in_words, make_tables, notes

    console = Console(highlight=False, markup=False, emoji=False)
    for text in make_tables(report):
        table = Table(title=text.title, title_justify="left", box=None, pad_edge=False)
        for index, heading in enumerate(text.headings):
            table.add_column(heading, justify="right" if index else "left", overflow="fold")
        for row in text.rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    for line in (*notes(report), describe_machine_in_words(report)):
        console.print(line)
