"""`fluxdeploy build`: a checkpoint becomes a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fluxdeploy.cli.options import (
    AS_JSON,
    COMPONENT_PRECISION,
    PRECISION,
    RUNTIME,
    component_precisions,
)
from fluxdeploy.progress import Progress


@click.command()
@click.argument("checkpoint", required=False)
@PRECISION
@COMPONENT_PRECISION
@RUNTIME
@click.option("--target", help="The device the engines are for: cpu or cuda.  [default: the best]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="bundle",
    help="The bundle's folder. An earlier bundle there stays usable until the new one is whole.",
)
@AS_JSON
def command(
    checkpoint: str | None,
    precision: str,
    component_precision: tuple[str, ...],
    runtime: str,
    target: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Build a bundle from CHECKPOINT: ONNX files, engines, tokenizers and a manifest.

    CHECKPOINT is a folder in diffusers layout, a folder or transformer file in Black Forest Labs'
    layout, a hub id, or the name of a small model that comes with the package: demo:dev, the
    default, or demo:schnell. No weight is loaded to export: the graphs point into the checkpoint's
    own files, hard-linked where the disk allows it. Every engine is checked against PyTorch before
    the bundle is called whole.

    A build that was cut off goes on where it was when the same command is run again.

    \b
    Examples:
      fluxdeploy build
      fluxdeploy build demo:schnell --out schnell
      fluxdeploy build ./FLUX.1-dev --out flux-dev
      fluxdeploy build black-forest-labs/FLUX.1-schnell --precision fp16 --out flux-schnell
      fluxdeploy build flux1-dev.safetensors --component-precision t5=fp32
    """
    from fluxdeploy.build import BuildRequest, build

    request = BuildRequest(
        checkpoint,
        precision,
        component_precisions(component_precision),
        runtime,
        target,
    )
    with Progress(quiet=as_json) as progress:
        bundle = build(request, out, progress)
    precisions = {name: record.precision for name, record in bundle.manifest.components.items()}
    if as_json:
        report = {"bundle": str(out), "hash": bundle.content_hash, "precisions": precisions}
        click.echo(json.dumps(report))
        return
    for used in sorted(set(precisions.values()) - {precision}):
        names = [name for name, other in precisions.items() if other == used]
        who = "all components" if len(names) == len(precisions) else ", ".join(names)
        click.echo(f"{used} in place of {precision}: {who}")
    click.echo(f'{out} is ready: fluxdeploy generate "a prompt" --bundle {out}')
