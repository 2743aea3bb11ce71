"""`fluxdeploy refit`: other LoRAs in a bundle that is there."""

from __future__ import annotations

from pathlib import Path

import click

from fluxdeploy.cli.options import AS_JSON, BASE, CHECKPOINT_NAME, FOLDER, LORAS
from fluxdeploy.library_output import libraries_on_stderr
from fluxdeploy.lora import LoraFile
from fluxdeploy.progress import Progress
from fluxdeploy.terminal import say, say_json


@click.command()
@click.argument("bundle", type=FOLDER, default="bundle")
@LORAS
@click.option(
    "--checkpoint",
    type=CHECKPOINT_NAME,
    help="What the bundle was made from.  [default: what it records, of the package or a hub]",
)
@BASE
@AS_JSON
def command(
    bundle: Path,
    loras: tuple[LoraFile, ...],
    checkpoint: str | None,
    base: Path | None,
    as_json: bool,
) -> None:
    """Swap the LoRAs of BUNDLE, without exporting it again.

    The LoRAs named take the place of all that are merged into it; without --lora the base comes
    back. Graphs and calibration stay: weight files and golden tensors of the components that old or
    new LoRAs change are written anew, as a build with the same --lora makes them, and their engines
    are checked. The bundle stays usable until the new one is whole. Bundles with engines of
    TensorRT or native ones are built again instead.

    \b
    Examples:
      fluxdeploy refit --lora demo:embers
      fluxdeploy refit flux-dev --checkpoint ./FLUX.1-dev --lora style.safetensors:0.8
      fluxdeploy refit flux-dev --checkpoint ./FLUX.1-dev
    """
    from fluxdeploy.build.refit import refit

    with libraries_on_stderr(), Progress(quiet=as_json) as progress:
        made = refit(bundle, checkpoint, loras, progress, base)
    merged = made.manifest.provenance.get("loras", [])
    if as_json:
        say_json({"bundle": str(bundle), "hash": made.content_hash, "loras": merged})
        return
    names = ", ".join(lora.path.name for lora in loras)
    say(f"{bundle} has {names} merged." if names else f"{bundle} is the base again.")
