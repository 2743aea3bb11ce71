"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from fluxdeploy.errors import UsageError

__all__ = [
    "AS_JSON",
    "BUNDLE",
    "COMPONENT_PRECISION",
    "PRECISION",
    "RUNTIME",
    "THREADS",
    "component_precisions",
]

_PRECISIONS = ("fp32", "bf16", "fp16")

PRECISION = click.option(
    "--precision",
    type=click.Choice(_PRECISIONS),
    default="bf16",
    help="What the transformer computes in; the other components follow.",
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

THREADS = click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the runtime's choice]"
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
        if not separator or precision not in _PRECISIONS:
            raise UsageError(
                f"--component-precision {value!r} is not NAME=PRECISION with one of "
                f"{', '.join(_PRECISIONS)}."
            )
        pairs[name] = precision
    return pairs
