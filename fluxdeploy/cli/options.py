"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path

import click

from fluxdeploy.errors import UsageError
from fluxdeploy.precision import PRECISIONS

__all__ = [
    "AS_JSON",
    "BUNDLE",
    "CALIBRATION",
    "COMPONENT_PRECISION",
    "DEVICE",
    "MAX_BATCH",
    "MAX_SIZE",
    "MIN_SIZE",
    "OPT_SIZE",
    "PRECISION",
    "RUNTIME",
    "TARGETS",
    "THREADS",
    "component_precisions",
]

PRECISION = click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="bf16",
    help="What the transformer computes in; the other components follow.",
)

CALIBRATION = click.option(
    "--calibration",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="For static scales: a text file with a prompt a line to measure activations with, or the "
    "calibration.json of an earlier build of the same checkpoint.  [default: prompts of our own]",
)

BUNDLE = click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    default="bundle",
    help="The folder that `build` wrote.",
)

RUNTIME = click.option(
    "--runtime",
    default="auto",
    help="What runs the engines; `doctor` lists what this machine has.",
)

TARGETS = click.option(
    "--target",
    "targets",
    multiple=True,
    help="What the engines are for: cpu, cuda, or a GPU's compute capability such as sm89. May be "
    "given several times.  [default: the best here]",
)

THREADS = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads, at most those of the machine.  [default: the runtime's choice]",
)

DEVICE = click.option(
    "--device",
    type=click.IntRange(min=0),
    default=0,
    help="Which GPU, by its number, where there are several.",
)


def parse_size(value: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels, as (height, width)."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not WIDTHxHEIGHT in pixels, such as 1024x768.")
    return int(found[2]), int(found[1])


MIN_SIZE = click.option(
    "--min-size",
    type=parse_size,
    metavar="WxH",
    help="Built engines: the smallest picture.  [default: a quarter of --opt-size each way]",
)

OPT_SIZE = click.option(
    "--opt-size",
    type=parse_size,
    metavar="WxH",
    help="Built engines: the picture that they are tuned for.  [default: the checkpoint's]",
)

MAX_SIZE = click.option(
    "--max-size",
    type=parse_size,
    metavar="WxH",
    help="Built engines: the largest picture. Any proportions with as many pixels will "
    "do.  [default: twice --opt-size each way]",
)

MAX_BATCH = click.option(
    "--max-batch",
    type=click.IntRange(min=1, max=64),
    default=1,
    help="Built engines: pictures in one call.",
)

AS_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, and no progress."
)

COMPONENT_PRECISION = click.option(
    "--component-precision",
    multiple=True,
    metavar="NAME=PRECISION",
    help="Override one component, such as t5=fp32. May be given several times.",
)


def component_precisions(values: tuple[str, ...]) -> dict[str, str]:
    """NAME=PRECISION pairs as a mapping. Raises `UsageError` for anything else."""
    pairs = {}
    for value in values:
        name, separator, precision = value.partition("=")
        if not separator or precision not in PRECISIONS:
            raise UsageError(
                f"--component-precision {value!r} is not NAME=PRECISION with one of "
                f"{', '.join(PRECISIONS)}."
            )
        pairs[name] = precision
    return pairs
