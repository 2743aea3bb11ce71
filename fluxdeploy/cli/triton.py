"""`fluxdeploy triton`: a bundle becomes a model repository of Triton Inference Server."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from fluxdeploy.cli.options import AS_JSON, BUNDLE, DEVICE, FOLDER, RUNTIME, THREADS
from fluxdeploy.terminal import say, say_json

if TYPE_CHECKING:
    from fluxdeploy.serve.triton.config import Form


@click.command()
@BUNDLE
@click.option(
    "--out",
    type=FOLDER,
    default="model_repository",
    help="The repository's folder. An earlier one there is replaced once the new one is whole.",
)
@click.option(
    "--form",
    type=click.Choice(["pipeline", "bls"]),
    default="pipeline",
    help="pipeline: one model, with the engines in it. bls: the host in a model, and each engine "
    "in one of Triton's own backends.",
)
@RUNTIME
@DEVICE
@THREADS
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    default=64,
    help="Requests of a priority, and of those above it, that may wait; one more is refused.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Seconds after which a request without a timeout of its own ends; 0 for never.",
)
@AS_JSON
def command(
    bundle: Path,
    out: Path,
    form: str,
    runtime: str,
    device: int,
    threads: int | None,
    max_waiting: int,
    timeout: float,
    as_json: bool,
) -> None:
    """Write a model repository for Triton Inference Server.

    It holds all that the server needs: the bundle's files (hard-linked where the disk allows it),
    a configuration that is complete, a script that starts the official container, and a client. The
    options become parameters of the configuration, and can be changed there.

    \b
    Examples:
      fluxdeploy triton
      fluxdeploy triton --bundle flux-dev --out models --max-waiting 16 --timeout 60
      fluxdeploy triton --bundle flux-dev --out models --form bls
    """
    from fluxdeploy.bundle import open_bundle
    from fluxdeploy.serve.triton.config import Settings
    from fluxdeploy.serve.triton.repository import write_repository

    settings = Settings(runtime, device, threads, max_waiting, default_timeout_seconds=timeout)
    models = write_repository(open_bundle(bundle), out, cast("Form", form), settings)
    if as_json:
        say_json({"repository": str(out), "form": form, "models": models})
        return
    say(f"{out} is ready, with {', '.join(models)}: {shlex.quote(str(out / 'run.sh'))}")
