"""`generate --grid`: its option, where its pictures go, and what is told of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fluxdeploy.errors import UsageError
from fluxdeploy.terminal import say, say_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxdeploy.batch.grid import Axis, Grid
    from fluxdeploy.batch.jobs import Job

__all__ = [
    "GRID_SHEET",
    "AxisType",
    "check_grid",
    "place_of_pictures",
    "read_pictures",
    "report_grid",
    "write_grid",
]

GRID_SHEET = Path("grid.png")
"""Where a grid goes that --sheet does not name."""

_PARAMETERS = {"seed": "seeds", "true-cfg-scale": "true_cfg_scale"}
"""Axes whose option has another name in the command."""


class AxisType(click.ParamType):  # type: ignore[type-arg]
    """NAME=VALUE,VALUE,...; gives an `Axis`."""

    name = "axis"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from fluxdeploy.batch.grid import parse_axis

        try:
            return parse_axis(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from fluxdeploy.batch.grid import AXES

        names = [f"{name}=" for name in AXES]
        return [
            click.shell_completion.CompletionItem(name)
            for name in names
            if name.startswith(incomplete)
        ]


def check_grid(axes: Sequence[Axis], source: str | None) -> None:
    """Raise `UsageError` where a grid is asked for beside what has a say of its own."""
    if source is not None:
        raise UsageError("--grid compares pictures of a PROMPT, and not of --prompts.")
    for axis in axes:
        if _is_given(_PARAMETERS.get(axis.name, axis.name)):
            raise UsageError(
                f"--{axis.name} is also an axis of the grid. Leave out one of them: each place has "
                "one value."
            )


def place_of_pictures(out: Path) -> Path:
    """What the pictures of a grid are called after: without --out they vanish with the command."""
    if _is_given("out"):
        return out
    folder = click.get_current_context().with_resource(tempfile.TemporaryDirectory())
    return Path(folder) / out.name


def _is_given(parameter: str) -> bool:
    source = click.get_current_context().get_parameter_source(parameter)
    return source is ParameterSource.COMMANDLINE


def read_pictures(paths: Sequence[Path]) -> list[Image]:
    """Pictures that were written, in memory."""
    from PIL import Image

    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append(image.convert("RGB"))
    return pictures


def write_grid(sheet: Path, grid: Grid, written: Sequence[tuple[Path, str]]) -> None:
    """Put the pictures of a grid into one, under their prompt where all have the same."""
    from fluxdeploy.host.pictures import write_png
    from fluxdeploy.host.sheet import grid_sheet

    prompts = {prompt for _, prompt in written}
    title = prompts.pop() if len(prompts) == 1 else ""
    pictures = read_pictures([path for path, _ in written])
    write_png(grid_sheet(pictures, grid.rows, grid.columns, title), sheet)


def report_grid(
    sheet: Path,
    grid: Grid,
    jobs: Sequence[Job],
    seconds: float,
    warned: Sequence[str],
    as_json: bool,
) -> None:
    """Tell of a grid: what goes down and across, and the files that stay."""
    paths = [str(path) for job in jobs for path in job.paths] if _is_given("out") else []
    seeds = list(dict.fromkeys(job.order.seed for job in jobs))
    if as_json:
        say_json(
            {
                "sheet": str(sheet),
                "paths": paths,
                "axes": [{"name": axis.name, "values": axis.values} for axis in grid.axes],
                "seeds": seeds,
                "seconds": round(seconds, 3),
                "warnings": list(warned),
            }
        )
        return
    for path in (*paths, str(sheet)):
        say(path)
    told = ", ".join(map(str, seeds))
    say(f"{len(grid.rows)} x {len(grid.columns)} pictures, seed {told}, {seconds:.1f} s", err=True)
