"""`fluxdeploy export`: only the ONNX files and their weights."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fluxdeploy.cli.options import (
    AS_JSON,
    CALIBRATION,
    COMPONENT_PRECISION,
    PRECISION,
    component_precisions,
)
from fluxdeploy.errors import UsageError
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress


@click.command()
@click.argument("checkpoint", required=False)
@PRECISION
@COMPONENT_PRECISION
@CALIBRATION
@click.option(
    "--component",
    "components",
    multiple=True,
    metavar="NAME",
    help="Export only this component. May be given several times.  [default: all]",
)
@click.option(
    "--no-split",
    is_flag=True,
    help="One transformer with the tensors of the published FLUX.1 ONNX files, no conditioner.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="onnx",
    help="The folder for NAME.onnx and weights/.",
)
@AS_JSON
def command(
    checkpoint: str | None,
    precision: str,
    component_precision: tuple[str, ...],
    calibration: Path | None,
    components: tuple[str, ...],
    no_split: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Export CHECKPOINT's components to ONNX, for other tools.

    Writes NAME.onnx for each component, and beside them weights/: hard links to the checkpoint's
    files where the precision allows it, converted tensors otherwise. `build` does this and more.
    bf16 stays bf16 here, whether this machine can run it or not. Precisions with static scales also
    write calibration.json.

    \b
    Examples:
      fluxdeploy export
      fluxdeploy export ./FLUX.1-dev --precision fp16 --out flux-onnx
      fluxdeploy export flux1-dev.safetensors --component transformer --no-split
    """
    from fluxdeploy.build.checkpoint import hash_checkpoint, open_source

    overrides = component_precisions(component_precision)
    source = open_source(checkpoint)
    from exporters.calibrate.find import find_ranges, open_calibration
    from exporters.calibrate.range_file import write_ranges
    from exporters.components.precisions import check_precision
    from exporters.components.precisions import component_precision as precision_of
    from exporters.export import COMPONENTS, export_component
    from exporters.weights.bind import WeightFolder

    unknown = [name for name in (*components, *overrides) if name not in COMPONENTS]
    if unknown:
        raise UsageError(
            f"There is no component {unknown[0]!r}; there are {', '.join(COMPONENTS)}."
        )
    if no_split and "conditioner" in components:
        raise UsageError("With --no-split the conditioner is a part of the transformer.")
    chosen = [name for name in components or COMPONENTS if not (no_split and name == "conditioner")]
    folder = WeightFolder(out / "weights")
    precisions = {name: overrides.get(name) or precision_of(name, precision) for name in chosen}
    for name, asked in precisions.items():
        check_precision(name, asked)
    files = {}
    with Progress(quiet=as_json) as progress:
        ranges = None
        if any(PRECISIONS[asked].calibrated for asked in precisions.values()):
            digest = hash_checkpoint(source, progress).digest
            measured = open_calibration(source, digest, calibration)
            ranges = find_ranges(measured, source, digest, None, progress)
            write_ranges(ranges, out / "calibration.json")
        task = progress.task("Exporting", total=len(chosen))
        for name in chosen:
            exported = export_component(
                source,
                name,
                precisions[name],
                folder,
                ranges=ranges,
                split=not no_split,
                progress=progress,
            )
            files[name] = {
                "precision": exported.precision,
                "path": str(out / exported.path),
                "weights": [str(out / path) for path in exported.weights],
            }
            task.advance()
    if as_json:
        click.echo(json.dumps(files))
        return
    for name, entry in files.items():
        click.echo(f"{entry['path']} ({name}, {entry['precision']})")
