"""`fluxdeploy build`: a checkpoint becomes a bundle."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.cli.options import (
    AS_JSON,
    BASE,
    CALIBRATION,
    CHECKPOINT,
    COMPONENT_PRECISION,
    CONTROLNETS,
    FOLDER,
    IMAGE_ENCODER,
    IP_ADAPTER,
    LORA_RANK,
    LORAS,
    MAX_BATCH,
    MAX_SIZE,
    MIN_SIZE,
    OPT_SIZE,
    PRECISION,
    PROMPTS,
    QUALITY,
    REDUX,
    REPLACE,
    REPORT,
    RUNTIME,
    STRICT,
    TARGETS,
    TASK,
    WEIGHT_STREAMING,
    WORKSPACE,
    component_precisions,
)
from fluxdeploy.library_output import libraries_on_stderr
from fluxdeploy.lora import LoraFile
from fluxdeploy.progress import Progress
from fluxdeploy.terminal import say, say_json

if TYPE_CHECKING:
    from fluxdeploy.build.resolve import BuildRequest
    from fluxdeploy.bundle import Bundle
    from fluxdeploy.bundle.manifest import Manifest
    from fluxdeploy.verify.verify import VerifyReport

_PICTURES = 3
"""Of a report, where no prompts are given."""


@click.command()
@CHECKPOINT
@BASE
@TASK
@PRECISION
@COMPONENT_PRECISION
@CALIBRATION
@LORAS
@LORA_RANK
@CONTROLNETS
@IP_ADAPTER
@IMAGE_ENCODER
@REDUX
@QUALITY
@STRICT
@RUNTIME
@TARGETS
@MIN_SIZE
@OPT_SIZE
@MAX_SIZE
@MAX_BATCH
@WORKSPACE
@WEIGHT_STREAMING
@click.option(
    "--out",
    type=FOLDER,
    default="bundle",
    help="The bundle's folder. An earlier bundle there stays usable until the new one is whole.",
)
@REPLACE
@PROMPTS
@REPORT
@AS_JSON
def command(
    checkpoint: str | None,
    base: Path | None,
    task: str | None,
    precision: str,
    component_precision: tuple[str, ...],
    calibration: Path | None,
    loras: tuple[LoraFile, ...],
    lora_rank: int,
    controlnets: tuple[Path, ...],
    ip_adapter: Path | None,
    image_encoder: Path | None,
    redux: Path | None,
    quality: Promise | None,
    strict: bool,
    runtime: str,
    targets: tuple[str, ...],
    min_size: tuple[int, int] | None,
    opt_size: tuple[int, int] | None,
    max_size: tuple[int, int] | None,
    max_batch: int,
    workspace: int | None,
    weight_streaming: bool,
    out: Path,
    replace: bool,
    prompts: Path | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Build a bundle from CHECKPOINT: ONNX files, engines, tokenizers and a manifest.

    CHECKPOINT is a folder in diffusers layout, a folder or file in Black Forest Labs' or ComfyUI's,
    safetensors or GGUF, a hub id, or the name of a small model that comes with the package:
    demo:dev, the default, or demo:schnell. No weight is loaded to export: the graphs point into the
    checkpoint's own files, hard-linked where the disk allows it. Every engine is checked against
    PyTorch before the bundle is called whole.

    A build that was cut off goes on where it was when the same command is run again.

    \b
    Examples:
      fluxdeploy build
      fluxdeploy build demo:schnell --out schnell
      fluxdeploy build ./FLUX.1-dev --out flux-dev
      fluxdeploy build black-forest-labs/FLUX.1-schnell --precision fp16 --out flux-schnell
      fluxdeploy build flux1-dev.safetensors --component-precision t5=fp8-weights
      fluxdeploy build flux1-dev-Q8_0.gguf --base ./FLUX.1-dev --out flux-q8
      fluxdeploy build ./FLUX.1-dev --precision fp8 --runtime tensorrt-rtx --target sm89 --out rtx
    """
    from engines import runs_here
    from fluxdeploy.build.build import build
    from fluxdeploy.build.quality import tell_recipe
    from fluxdeploy.build.resolve import BuildRequest
    from fluxdeploy.build.sizes import SizeRange
    from fluxdeploy.bundle.typed_json import to_plain
    from fluxdeploy.cli.verify import read_prompts, show_report
    from fluxdeploy.verify.page import check_page, write_page

    request = BuildRequest(
        checkpoint,
        precision,
        component_precisions(component_precision),
        runtime,
        targets,
        SizeRange(min_size, opt_size, max_size, max_batch),
        calibration,
        quality,
        strict,
        None if workspace is None else workspace * 2**20,
        weight_streaming,
        replace,
        loras,
        lora_rank,
        base,
        controlnets,
        ip_adapter,
        image_encoder,
        redux,
        task,
    )
    if page is not None:
        check_page(page)
    given = read_prompts(prompts)
    with libraries_on_stderr(), Progress(quiet=as_json) as progress:
        bundle = build(request, out, progress)
        report = None
        if given or page is not None:
            report = _compare(bundle, request, given, progress)
    if report is not None and page is not None:
        write_page(report, bundle, page)
    components = bundle.manifest.components
    precisions = {name: record.precision for name, record in components.items()}
    recipes = {name: r.recipe for name, r in components.items() if r.recipe is not None}
    here = runs_here(record.engines for record in components.values())
    if as_json:
        say_json(
            {
                "bundle": str(out),
                "hash": bundle.content_hash,
                "precisions": precisions,
                "runs_here": here,
                "recipes": to_plain(recipes),
                "report": None if report is None else report.as_json(),
            }
        )
        return
    for used in sorted(set(precisions.values()) - {precision}):
        names = [name for name, other in precisions.items() if other == used]
        who = "all components" if len(names) == len(precisions) else ", ".join(names)
        say(f"{used} in place of {precision}: {who}")
    for name, recipe in recipes.items():
        for line in tell_recipe(name, recipe, components[name].compute):
            say(line)
    if report is not None:
        show_report(report)
    call = f'fluxdeploy generate "a prompt" --bundle {shlex.quote(str(out))}'
    call += "".join(_GIVEN.get(task, "") for task in bundle.manifest.tasks)
    if here:
        say(f"{out} is ready: {call}")
    else:
        devices = _devices(bundle.manifest)
        say(f"{out} is ready for {devices}; nothing on this machine runs it")
        say(f"to see here what it draws, slowly: {call} --runtime emulate")


_GIVEN = {
    "fill": " --image picture.png --mask mask.png",
    "control": " --control-image edges.png",
    "kontext": " --image picture.png",
}
"""What the call that a build tells has besides, by what the bundle does."""


def _compare(
    bundle: Bundle, request: BuildRequest, prompts: tuple[str, ...], progress: Progress
) -> VerifyReport:
    """The bundle's pictures beside PyTorch's: of what runs here, or else of its numbers."""
    from engines import EngineOptions, runs_here
    from fluxdeploy.demo import DEFAULT_CHECKPOINT
    from fluxdeploy.verify.verify import verify

    here = runs_here(record.engines for record in bundle.manifest.components.values())
    runtime = "auto" if here else "emulate"
    source = request.checkpoint or DEFAULT_CHECKPOINT
    pictures = None if prompts else _PICTURES
    return verify(
        bundle.root,
        source,
        runtime,
        EngineOptions(),
        progress,
        pictures,
        prompts,
        request.loras,
        request.base,
    )


def _devices(manifest: Manifest) -> str:
    """What a bundle's engines are for, in words."""
    targets: dict[str, dict[str, None]] = {}
    for record in manifest.components.values():
        for engine in record.engines:
            targets.setdefault(engine.runtime, {})[engine.target] = None
    return "; ".join(f"{runtime} on {', '.join(names)}" for runtime, names in targets.items())
