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
    RUNTIMES,
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
    from fluxdeploy.bundle.recipe import RecipeRecord
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
@RUNTIMES
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
    runtimes: tuple[str, ...],
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

    A bundle has an edition for each runtime that it was built for, with weights that are the same
    in the same files: `generate` takes what runs where it is. An edition that is built joins those
    of the bundle that is there, where it is of the same checkpoint; --replace leaves them out.

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
      fluxdeploy build ./FLUX.1-dev --target cpu --target sm89 --target sm120 --out flux-dev
    """
    from engines import choose_edition, edition_runs_here
    from fluxdeploy.build.build import build
    from fluxdeploy.build.resolve import BuildRequest
    from fluxdeploy.build.sizes import SizeRange
    from fluxdeploy.bundle.typed_json import to_plain
    from fluxdeploy.cli.verify import read_prompts, show_report
    from fluxdeploy.verify.page import check_page, write_page

    request = BuildRequest(
        checkpoint,
        precision,
        component_precisions(component_precision),
        runtimes,
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
            report = _compare(_first_built(bundle, request), request, given, progress)
    if report is not None and page is not None:
        write_page(report, _first_built(bundle, request), page)
    editions = bundle.manifest.each()
    here = [edition_runs_here(edition) for edition in editions]
    if as_json:
        described = [
            {
                "runtime": edition.runtime,
                "precisions": _precisions(edition),
                "runs_here": runs,
                "recipes": to_plain(_recipes(edition)),
            }
            for edition, runs in zip(editions, here, strict=True)
        ]
        say_json(
            {
                "bundle": str(out),
                "hash": bundle.content_hash,
                "precisions": described[0]["precisions"],
                "runs_here": any(here),
                "recipes": described[0]["recipes"],
                "editions": described,
                "report": None if report is None else report.as_json(),
            }
        )
        return
    for edition in editions:
        _tell_precisions(edition, precision, several=len(editions) > 1)
    if report is not None:
        show_report(report)
    call = f'fluxdeploy generate "a prompt" --bundle {shlex.quote(str(out))}'
    call += "".join(_GIVEN.get(task, "") for task in bundle.manifest.tasks)
    if any(here):
        say(f"{out} is ready: {call}")
    else:
        devices = "; ".join(map(_devices, editions))
        say(f"{out} is ready for {devices}; nothing on this machine runs it")
        say(f"to see here what it draws, slowly: {call} --runtime emulate")
    if any(here) and len(editions) > 1:
        taken = choose_edition(bundle).manifest.runtime
        for edition, runs in zip(editions, here, strict=True):
            say(f"  {_devices(edition)}: {_how_here(edition.runtime, taken, runs)}")


def _precisions(edition: Manifest) -> dict[str, str]:
    return {name: record.precision for name, record in edition.components.items()}


def _recipes(edition: Manifest) -> dict[str, RecipeRecord]:
    return {n: r.recipe for n, r in edition.components.items() if r.recipe is not None}


def _tell_precisions(edition: Manifest, asked: str, *, several: bool) -> None:
    """What is in another precision than was asked for, and what departs from its own.

    asked: what this build has asked for; an edition that stays tells by itself.
    """
    from fluxdeploy.build.quality import tell_recipe

    precisions = _precisions(edition)
    asked = str(edition.provenance.get("requested_precision", asked))
    before = f"{edition.runtime}: " if several else ""
    for used in sorted(set(precisions.values()) - {asked}):
        names = [name for name, other in precisions.items() if other == used]
        who = "all components" if len(names) == len(precisions) else ", ".join(names)
        say(f"{before}{used} in place of {asked}: {who}")
    for name, recipe in _recipes(edition).items():
        for line in tell_recipe(name, recipe, edition.components[name].compute):
            say(f"{before}{line}")


def _how_here(runtime: str, taken: str, runs: bool) -> str:
    """What an edition is to this machine, in words."""
    if runtime == taken:
        return "`generate` takes it here"
    return f"runs here with --runtime {runtime}" if runs else "does not run here"


_GIVEN = {
    "fill": " --image picture.png --mask mask.png",
    "control": " --control-image edges.png",
    "kontext": " --image picture.png",
}
"""What the call that a build tells has besides, by what the bundle does."""


def _first_built(bundle: Bundle, request: BuildRequest) -> Bundle:
    """The first of the editions that a build was asked for."""
    from engines import choose_runtime

    (runtime, _), *_ = request.runtimes_by(choose_runtime)
    return next(each for each in bundle.editions if each.manifest.runtime == runtime.name)


def _compare(
    edition: Bundle, request: BuildRequest, prompts: tuple[str, ...], progress: Progress
) -> VerifyReport:
    """The pictures of an edition beside PyTorch's.

    Of its engines where they run here, or else of its numbers.
    """
    from engines import EngineOptions, edition_runs_here
    from fluxdeploy.demo import DEFAULT_CHECKPOINT
    from fluxdeploy.verify.verify import verify

    runtime = "auto" if edition_runs_here(edition.manifest) else "emulate"
    source = request.checkpoint or DEFAULT_CHECKPOINT
    pictures = None if prompts else _PICTURES
    return verify(
        edition.root,
        source,
        runtime,
        EngineOptions(),
        progress,
        pictures,
        prompts,
        request.loras,
        request.base,
        edition.manifest.runtime,
    )


def _devices(manifest: Manifest) -> str:
    """What an edition's engines are for, in words."""
    targets: dict[str, dict[str, None]] = {}
    for record in manifest.components.values():
        for engine in record.engines:
            targets.setdefault(engine.runtime, {})[engine.target] = None
    return "; ".join(f"{runtime} on {', '.join(names)}" for runtime, names in targets.items())
