"""Settling a build once: what is asked, held against a checkpoint and a runtime.

What comes out is read by `plan` and by `build`; nothing of it is decided again. Headers are read,
and no weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engines import Runtime, choose_runtimes, runtimes
from engines.editions import Choose
from fluxdeploy.arguments import check_integer
from fluxdeploy.build.checkpoint import check_drawable, check_family, check_limits
from fluxdeploy.build.sizes import (
    MOST_RANK,
    MOST_SEEN,
    SizeRange,
    any_size,
    overall,
    resolution_buckets,
)
from fluxdeploy.bundle.manifest import (
    Defaults,
    DimensionRange,
    EngineRecord,
    ScheduleSpec,
    component_stem,
)
from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.errors import CheckpointError, UsageError
from fluxdeploy.kernels import AttentionKernels
from fluxdeploy.lora import LoraFile
from fluxdeploy.precision import DEFAULT_PRECISION, PRECISIONS

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint
    from exporters.export import ExportSpec
    from exporters.quality.recipes import Asked
    from exporters.tokenizers import CanonicalTokenizer

__all__ = ["BuildRequest", "BuildSpec", "ComponentSpec", "graph_path", "list_engines", "resolve"]


@dataclass(frozen=True)
class BuildRequest:
    """What to build. `checkpoint` None is the default, no `targets` are the best one here. `base`
    is a folder with what a checkpoint of a single file lacks. Each of `runtimes` gets an edition of
    the bundle.

    `precision` is the transformer's and decides the others' (docs/bundle.md);
    `component_precision` overrides single ones. `calibration` is a file of prompts, or the
    calibration.json of another bundle of the same checkpoint. `promise` is what pictures have to
    keep in few bits, None for what the precision promises; with one that asks for nothing they are
    not looked at. With `strict` a precision that does not keep it is an error.
    `sizes` are for runtimes whose engines are tuned, `memory_limit` and `weight_streaming` for
    TensorRT. With `replace` nothing stays of a bundle at the destination: not the editions of other
    runtimes, and not that it runs on this machine.
    `loras` are merged into the weights; with a `lora_rank` the bundle takes others with each call,
    whose ranks add up to it at most. `controlnets` are folders of ControlNets that join the bundle,
    `ip_adapter` is a file or folder of an IP-Adapter that does, with the `image_encoder` that it
    takes, a folder, None where that lies beside it; and `redux` is the folder of a Redux. `task` is
    what the checkpoint is for, where it does not tell.
    """

    checkpoint: str | None = None
    precision: str = DEFAULT_PRECISION
    component_precision: Mapping[str, str] = field(default_factory=dict)
    runtimes: tuple[str, ...] = ("auto",)
    targets: tuple[str, ...] = ()
    sizes: SizeRange = field(default_factory=SizeRange)
    calibration: Path | None = None
    promise: Promise | None = None
    strict: bool = False
    memory_limit: int | None = None
    weight_streaming: bool = False
    replace: bool = False
    loras: tuple[LoraFile, ...] = ()
    lora_rank: int = 0
    base: Path | None = None
    controlnets: tuple[Path, ...] = ()
    ip_adapter: Path | None = None
    image_encoder: Path | None = None
    redux: Path | None = None
    task: str | None = None

    @property
    def paths_beside(self) -> tuple[Path, ...]:
        """Where what joins the checkpoint lies."""
        others = (self.ip_adapter, self.image_encoder, self.redux)
        return (*self.controlnets, *(path for path in others if path is not None))

    @property
    def transformer_precision(self) -> str:
        """What a runtime must have, if one is to be chosen."""
        return self.component_precision.get("transformer", self.precision)

    def runtimes_by(self, choose: Choose) -> tuple[tuple[Runtime, tuple[str, ...]], ...]:
        """The runtimes of the editions with their targets, as `choose_runtimes` finds them."""
        return choose_runtimes(
            self.runtimes,
            self.targets,
            self.transformer_precision,
            self.component_precision,
            choose,
        )


@dataclass(frozen=True)
class ComponentSpec:
    """A component of the bundle that is to be built.

    export: its chain, its weights and what becomes of them. stem: what its own files are called.
    runtime, targets: what will run it, and on which devices. kernels: what will compute it.
    profiles: the sizes that its engines are built for. engines: one for each target.
    """

    export: ExportSpec
    stem: str
    runtime: Runtime
    targets: tuple[str, ...]
    kernels: AttentionKernels
    profiles: tuple[Mapping[str, DimensionRange], ...]
    engines: tuple[EngineRecord, ...]

    @property
    def name(self) -> str:
        return self.export.name

    @property
    def fused(self) -> bool:
        """Whether its attention is ONNX Runtime's own operator in the graph."""
        return self.kernels is AttentionKernels.ONNX_RUNTIME

    @property
    def precision(self) -> str:
        return self.export.precision

    @property
    def compute(self) -> str:
        return self.export.compute

    @property
    def quantized(self) -> bool:
        return PRECISIONS[self.precision].quantization is not None

    @property
    def asked(self) -> Asked:
        """What its recipe is found for. Only of a quantized one."""
        from exporters.quality.recipes import Asked

        return Asked(self.export.component, self.precision, self.compute)


@dataclass(frozen=True)
class BuildSpec:
    """All of an edition of a bundle that is to be built, and for what.

    `runtime` and `targets` are what was asked for; a component may have others, see `Runtime.of`.
    `edition` is empty for the first one of the bundle, and else the runtime's name.
    """

    request: BuildRequest
    checkpoint: Checkpoint
    schedule: ScheduleSpec
    defaults: Defaults
    tokenizers: Mapping[str, CanonicalTokenizer]
    runtime: Runtime
    targets: tuple[str, ...]
    components: tuple[ComponentSpec, ...]
    edition: str = ""

    def component(self, name: str) -> ComponentSpec:
        return next(spec for spec in self.components if spec.name == name)


def resolve(
    request: BuildRequest,
    checkpoint: Checkpoint,
    runtime: Runtime,
    targets: tuple[str, ...],
    edition: str = "",
) -> BuildSpec:
    """Settle what `request` asks of a checkpoint, for `targets` of `runtime`.

    A component that the checkpoint lacks and a bundle may lack is left out. Raises `UsageError` for
    names, precisions and sizes that do not exist, and `CheckpointError` for a checkpoint that is
    incomplete, that contradicts itself, whose parts do not belong together, or whose scheduler no
    host has.
    """
    from exporters.components.registry import choose_precisions, components_of
    from exporters.export import check_all_used, specify

    check_family(checkpoint)
    check_limits(checkpoint)
    _check_seen(checkpoint)
    tokenizers = _tokenizers(checkpoint)
    check_drawable(checkpoint, tokenizers)
    known = components_of(checkpoint)
    asked = choose_precisions(known, request.precision, request.component_precision)
    components = []
    for name, component in known.items():
        if not component.present(checkpoint):
            continue
        own, devices = runtime.of(name, targets)
        precision = own.precision(devices[0], asked[name], name)
        usual = own.compute(devices[0], precision)
        compute = component.compute_type(precision, usual)
        export = specify(checkpoint, component, precision, compute)
        if request.lora_rank and component.part == "transformer":
            _check_lora(own, request.lora_rank)
            export = export.with_side_paths()
        if name == "transformer":
            for option, given in (
                ("--controlnet", bool(checkpoint.controlnets)),
                ("--ip-adapter", checkpoint.ip_adapter is not None),
            ):
                if given:
                    _check_joins(own, option, request.lora_rank)
        specs = export.chain.inputs + export.chain.outputs
        symbols = {d for spec in specs for d in spec.shape if isinstance(d, str)}
        # T5 reads the prompt alone.
        text = 0 if name == "t5" else checkpoint.picture_tokens
        profiles = _profiles(symbols, request, checkpoint, own, text)
        stem = component_stem(name, edition)
        engines = list_engines(own, devices, name, overall(profiles), stem)
        kernels = own.attention(devices[0], precision, compute)
        components.append(ComponentSpec(export, stem, own, devices, kernels, profiles, engines))
    check_all_used(checkpoint, [component.export for component in components], known)
    return BuildSpec(
        request,
        checkpoint,
        checkpoint.schedule,
        _defaults(request, checkpoint, runtime),
        tokenizers,
        runtime,
        targets,
        tuple(components),
        edition,
    )


def _tokenizers(checkpoint: Checkpoint) -> dict[str, CanonicalTokenizer]:
    from exporters.tokenizers import canonical_tokenizer

    lengths = {"clip": None, "t5": checkpoint.max_text_tokens}
    return {
        name: canonical_tokenizer(checkpoint.tokenizer(name), name, length)
        for name, length in lengths.items()
    }


def _defaults(request: BuildRequest, checkpoint: Checkpoint, runtime: Runtime) -> Defaults:
    """What hosts use: the checkpoint's, in the size that engines are tuned for."""
    if not runtime.tuned or request.sizes.opt is None:
        return checkpoint.defaults
    height, width = request.sizes.opt
    return replace(checkpoint.defaults, height=height, width=width)


def _profiles(
    symbols: set[str], request: BuildRequest, checkpoint: Checkpoint, runtime: Runtime, text: int
) -> tuple[Mapping[str, DimensionRange], ...]:
    """text: the tokens behind those of a prompt."""
    defaults, latents, rank = checkpoint.defaults, checkpoint.latents, request.lora_rank
    more = checkpoint.references, text
    if runtime.tuned:
        return resolution_buckets(symbols, request.sizes, defaults, latents, rank, *more)
    return (any_size(symbols, defaults, latents, rank, *more),)


def _check_lora(runtime: Runtime, rank: int) -> None:
    check_integer("--lora-rank", rank, 0, MOST_RANK)
    if not runtime.side_paths:
        able = ", ".join(known.name for known in runtimes() if known.side_paths)
        raise UsageError(
            f"{runtime.name} has no side paths for LoRAs. Build without --lora-rank, or for a "
            f"runtime that has them: {able}."
        )


def _check_seen(checkpoint: Checkpoint) -> None:
    tokens = 0 if checkpoint.ip_adapter is None else checkpoint.ip_adapter.tokens
    if tokens > MOST_SEEN:
        raise CheckpointError(
            f"The IP-Adapter makes {tokens} tokens of a picture, and engines take {MOST_SEEN} at "
            "most: it is damaged, or of another kind."
        )


def _check_joins(runtime: Runtime, option: str, rank: int) -> None:
    """Refuse a network that joins by an option where the transformer has no place for it."""
    if not runtime.joins:
        able = ", ".join(known.name for known in runtimes() if known.joins)
        raise UsageError(
            f"{runtime.name} has no inputs for what other networks give the transformer. Build "
            f"without {option}, or for a runtime that has them: {able}."
        )
    if rank:
        raise UsageError(
            f"A bundle with {option} has no --lora-rank. Merge LoRAs at the build with --lora, or "
            "leave one of the two out."
        )


def list_engines(
    runtime: Runtime,
    targets: tuple[str, ...],
    component: str,
    dimensions: Mapping[str, DimensionRange],
    stem: str = "",
) -> tuple[EngineRecord, ...]:
    """An engine for each target: one that serves several has fewer kernels merged.

    stem: what the component's own files are called, where it is not the component's name.
    """
    version = runtime.version()
    return tuple(
        EngineRecord(
            runtime.name,
            version,
            target,
            _engine_path(runtime, target, component, stem or component),
            dimensions,
        )
        for target in targets
    )


def graph_path(stem: str) -> str:
    """Where the graph of a component is, in a bundle."""
    return f"onnx/{stem}.onnx"


def _engine_path(runtime: Runtime, target: str, component: str, stem: str) -> str:
    if not runtime.builds:
        return graph_path(stem)
    return f"engines/{runtime.name}/{target}/{component}.engine"
