"""Refitting: other LoRAs, or none, in a bundle that is there, whose graphs stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engines import Runtime, choose_builder, runtimes
from fluxdeploy.build.checkpoint import (
    checkpoint_record,
    find_checkpoint,
    recorded_task,
    require_recorded,
    require_unchanged,
)
from fluxdeploy.build.components import make_components
from fluxdeploy.build.keys import tool_versions
from fluxdeploy.build.resolve import BuildRequest, resolve
from fluxdeploy.build.run import BuildRun
from fluxdeploy.build.staging import Staging
from fluxdeploy.build.tokenizers import make_tokenizer
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.bundle.files import HashCache
from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.errors import UsageError
from fluxdeploy.lora import LoraFile
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

__all__ = ["refit"]


def refit(
    path: Path,
    checkpoint: str | None,
    loras: Sequence[LoraFile],
    progress: Progress,
    base: Path | None = None,
) -> Bundle:
    """Merge `loras`, in place of those that it has, into the bundle at `path`.

    Nothing is traced and nothing calibrated: of the components that the old or the new LoRAs
    change, weight files and golden tensors are written anew, and their engines are checked. The
    weight files are those of a build with the same LoRAs. `checkpoint` is what the bundle was made
    from, None where it comes with the package or from a hub, and `base` what it lacks. The bundle
    stays usable until the end. Skips that were tuned for the old weights are left out.

    Raises `UsageError` for a bundle whose engines hold weights or that other versions have built,
    for another checkpoint and where none is known, and the errors of each step.
    """
    bundle = open_bundle(path)
    if bundle.manifest.editions:
        names = ", ".join(edition.runtime for edition in bundle.manifest.each())
        raise UsageError(
            f"{bundle.root} has editions for {names}, and refit swaps the weights of bundles for "
            "one runtime. Run `fluxdeploy build` with the same --lora and each --runtime."
        )
    beside = {
        "ControlNets": bundle.manifest.controlnets,
        "an IP-Adapter": bundle.manifest.ip_adapter,
        "a Redux": bundle.manifest.redux,
    }
    for what, held in beside.items():
        if held:
            raise UsageError(
                f"{bundle.root} holds {what}, whose files refit does not look for. Run "
                "`fluxdeploy build` with the same --lora, --controlnet, --ip-adapter and --redux."
            )
    runtime, targets = _builder(bundle)
    _require_same_tools(bundle)
    name = checkpoint or _recorded_name(bundle)
    opened = find_checkpoint(name, loras, base, task=recorded_task(bundle))
    _require_same_channels(opened, bundle)
    spec = resolve(_request(bundle, name, loras), opened, runtime, targets)
    cache = HashCache()
    with Staging(path, cache.link) as staging:
        run = BuildRun(spec, staging, progress, cache, bundle.root)
        require_recorded(bundle, name, run.hashes)
        _require_same_calibration(run, bundle)
        tokenizers = {name: make_tokenizer(name, run) for name in spec.tokenizers}
        components = make_components(run, "Refitting components")
        require_unchanged(cache)
        provenance = {k: v for k, v in bundle.manifest.provenance.items() if k != "loras"}
        if opened.loras:
            provenance["loras"] = [asdict(lora) for lora in opened.loras]
        staging.commit(
            replace(
                bundle.manifest,
                components=components,
                tokenizers=tokenizers,
                provenance=provenance,
                skips=(),
            )
        )
    cache.renew()
    return open_bundle(path)


def _builder(bundle: Bundle) -> tuple[Runtime, tuple[str, ...]]:
    """What runs the bundle's graphs. Raises `UsageError` where something else does."""
    from exporters.formats import FORMATS

    for name, component in bundle.manifest.components.items():
        for engine in component.engines:
            (runtime,) = runtimes(engine.runtime)
            if runtime.builds:
                raise UsageError(
                    f"{name} of {bundle.root} is an engine of {engine.runtime}, which holds its "
                    "weights: refit swaps those of graphs alone. Run `fluxdeploy build` with the "
                    "same --lora."
                )
        quantization = PRECISIONS[component.precision].quantization
        if quantization is not None and FORMATS[quantization.format].shares_scales:
            raise UsageError(
                f"{name} of {bundle.root} is in {component.precision}, in which several weights "
                "share a scale: refit cannot bind them. Run `fluxdeploy build` with the same "
                "--lora."
            )
    engines = bundle.manifest.components["transformer"].engines
    return choose_builder(engines[0].runtime, tuple(engine.target for engine in engines))


def _require_same_tools(bundle: Bundle) -> None:
    from fluxdeploy import __version__

    tools = {"fluxdeploy": __version__} | tool_versions()
    recorded = bundle.manifest.provenance.get("tools")
    known = recorded if isinstance(recorded, dict) else {}
    for tool, version in tools.items():
        if known.get(tool) != version:
            raise UsageError(
                f"{bundle.root} was built with {tool} {known.get(tool, 'of no recorded version')}, "
                f"and {version} is installed: its graphs may not fit. Run `fluxdeploy build` with "
                "the same --lora."
            )


def _require_same_channels(checkpoint: Checkpoint, bundle: Bundle) -> None:
    """Raise `UsageError` where LoRAs make the transformer read more, or no longer do."""
    inputs = bundle.manifest.components["transformer"].inputs
    built = next(spec.shape[-1] for spec in inputs if spec.name == "hidden_states")
    reads = checkpoint.transformer.in_channels
    if built != reads:
        raise UsageError(
            f"The transformer of {bundle.root} reads {built} channels, and with these LoRAs it "
            f"would read {reads}: refit leaves graphs as they are. Run `fluxdeploy build` with the "
            "same --lora."
        )


def _require_same_calibration(run: BuildRun, bundle: Bundle) -> None:
    """Raise `UsageError` where a control LoRA is not the one that a bundle was calibrated with."""
    recorded = bundle.manifest.provenance.get("loras")
    records = recorded if isinstance(recorded, list) else []
    known = [(r.get("sha256"), r.get("scale")) for r in records if isinstance(r, dict)]
    lacks = [r for r in run.spec.checkpoint.unmerged.loras if (r.sha256, r.scale) not in known]
    if lacks and any(component.quantized for component in run.spec.components):
        raise UsageError(
            f"{bundle.root} is quantized, and was calibrated with another LoRA than "
            f"{lacks[0].name}. Run `fluxdeploy build` with the same --lora."
        )


def _recorded_name(bundle: Bundle) -> str:
    record = checkpoint_record(bundle)
    name, revision = record.get("name"), record.get("revision")
    if isinstance(name, str) and name in DEMO_CHECKPOINTS:
        return name
    if isinstance(name, str) and isinstance(revision, str):
        return f"{name}@{revision}"
    raise UsageError(
        f"Refitting {bundle.root} takes --checkpoint, what it was made from"
        + (f": {name}." if isinstance(name, str) else ".")
    )


def _request(bundle: Bundle, checkpoint: str, loras: Sequence[LoraFile]) -> BuildRequest:
    """A request that makes the same components, whatever was typed."""
    components = bundle.manifest.components
    precision = bundle.manifest.provenance.get("requested_precision")
    return BuildRequest(
        checkpoint=checkpoint,
        precision=precision if isinstance(precision, str) else components["transformer"].precision,
        component_precision={name: record.precision for name, record in components.items()},
        loras=tuple(loras),
        lora_rank=bundle.manifest.lora_rank,
    )
