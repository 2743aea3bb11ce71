"""`fluxdeploy export`: only the ONNX files and their weights."""

from __future__ import annotations

from pathlib import Path

import click

from fluxdeploy.cli.options import (
    AS_JSON,
    BASE,
    CALIBRATION,
    CHECKPOINT,
    COMPONENT_PRECISION,
    FOLDER,
    LORAS,
    PRECISION,
    TASK,
    complete_component,
    component_precisions,
)
from fluxdeploy.errors import UsageError
from fluxdeploy.library_output import libraries_on_stderr
from fluxdeploy.lora import LoraFile
from fluxdeploy.progress import Progress
from fluxdeploy.terminal import say, say_json


@click.command()
@CHECKPOINT
@BASE
@TASK
@PRECISION
@COMPONENT_PRECISION
@CALIBRATION
@LORAS
@click.option(
    "--component",
    "components",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_component,
    help="Export only this component. May be given several times.  [default: all]",
)
@click.option(
    "--no-split",
    is_flag=True,
    help="One transformer with the tensors of the published FLUX.1 ONNX files, no conditioner.",
)
@click.option(
    "--out",
    type=FOLDER,
    default="onnx",
    help="The folder for NAME.onnx and weights/.",
)
@click.option(
    "--link",
    is_flag=True,
    help="Hard links to the checkpoint's files where the disk allows it: no room, and no time. "
    "ONNX Runtime and TensorRT open them; onnx.load, Polygraphy and Netron refuse them.",
)
@AS_JSON
def command(
    checkpoint: str | None,
    base: Path | None,
    task: str | None,
    precision: str,
    component_precision: tuple[str, ...],
    calibration: Path | None,
    loras: tuple[LoraFile, ...],
    components: tuple[str, ...],
    no_split: bool,
    out: Path,
    link: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT's components to ONNX, for other tools.

    Writes NAME.onnx for each component, and beside them weights/ with what these need, and no
    more, of the checkpoint: clones of its files where the file system has clones (Btrfs, XFS),
    else copies of the tensors. `build` does this and more. bf16 stays bf16 here, whether this
    machine can run it or not. Precisions with static scales also write calibration.json.

    \b
    Examples:
      fluxdeploy export
      fluxdeploy export ./FLUX.1-dev --precision fp16 --out flux-onnx
      fluxdeploy export flux1-dev.safetensors --component transformer --no-split
    """
    from fluxdeploy.build.checkpoint import calibration_digest, find_checkpoint, hash_checkpoint

    overrides = component_precisions(component_precision)
    source = find_checkpoint(checkpoint, loras, base, task=task)
    from exporters.calibrate.find import open_calibration
    from exporters.calibrate.range_file import write_calibration
    from exporters.components.registry import (
        COMPONENTS,
        ONE_PIECE_COMPONENTS,
        choose_precisions,
        find_component,
    )
    from exporters.export import check_all_used, export_component, specify
    from exporters.quality.calibrate import calibrate
    from exporters.quality.recipes import Asked, layers_of
    from fluxdeploy.build.plan.exporting import place_weights
    from fluxdeploy.bundle.recipe import Promise

    if no_split and "conditioner" in components:
        raise UsageError("With --no-split the conditioner is a part of the transformer.")
    known = ONE_PIECE_COMPONENTS if no_split else COMPONENTS
    precisions = choose_precisions(known, precision, overrides)
    chosen = [find_component(name, known) for name in components or known]
    specs = [
        specify(source, component, precisions[component.name])
        for component in chosen
        if component.present(source)
    ]
    check_all_used(source, specs, known)
    if any(spec.layers for spec in specs):
        open_calibration(source, None, calibration)  # before anything is made
    folder, specs = place_weights(specs, out, link)
    files = {}
    with libraries_on_stderr(), Progress(quiet=as_json) as progress:
        asked = [
            Asked(spec.component, spec.precision, spec.compute) for spec in specs if spec.layers
        ]
        if asked:
            digest = calibration_digest(source, hash_checkpoint(source, progress))
            given = open_calibration(source, digest, calibration)
            found = calibrate(source.unmerged, digest, given, asked, Promise(), None, progress)
            write_calibration(found, out / "calibration.json")
            known_layers = {
                a.component.name: layers_of(
                    a,
                    source.unmerged,
                    found.recipes[a.component.name].recipe,
                    found.ranges,
                    found.means.get(a.component.name, {}),
                    found.moments.get(a.component.name, {}),
                )
                for a in asked
            }
            specs = [
                spec.with_layers(known_layers[spec.name]) if spec.layers else spec for spec in specs
            ]
        exporting = progress.task("Exporting", total=len(specs))
        for spec in specs:
            exported = export_component(spec, folder, progress=progress)
            files[spec.name] = {
                "precision": spec.precision,
                "path": str(out / exported.path),
                "weights": [str(out / path) for path in exported.weights],
            }
            exporting.advance()
    if as_json:
        say_json(files)
        return
    for name, entry in files.items():
        say(f"{entry['path']} ({name}, {entry['precision']})")
