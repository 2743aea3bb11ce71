"""Building: a checkpoint becomes a bundle, piece by piece, each finished piece kept for a rerun."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from engines import BuildSettings, Runtime, choose_builder
from fluxdeploy import __version__
from fluxdeploy.build.checkpoint import hash_checkpoint, open_source
from fluxdeploy.build.engines import build_engines, check_engine, list_engines
from fluxdeploy.build.keys import WeightPieces, digest, exporters_digest, tool_versions
from fluxdeploy.build.plan import make_plan
from fluxdeploy.build.sizes import SizeRange, any_size, overall, resolution_buckets
from fluxdeploy.build.staging import Staging
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.bundle.manifest import (
    SCHEMA_VERSION,
    ComponentRecord,
    DimensionRange,
    FileRecord,
    GoldenRecord,
    Manifest,
    QualityRecord,
    RopeSpec,
    TokenizerRecord,
)
from fluxdeploy.demo import DEFAULT_CHECKPOINT, DEMO_CHECKPOINTS
from fluxdeploy.errors import BundleError
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from exporters.calibrate.ranges import Ranges
    from exporters.checkpoint import Checkpoint

__all__ = ["BuildRequest", "build"]

_CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class BuildRequest:
    """What to build. `checkpoint` None is the default, no `targets` are the best one here.

    `precision` is the transformer's and decides the others' (docs/bundle.md);
    `component_precision` overrides single ones. `calibration` is a file of prompts, or the
    calibration.json of another bundle of the same checkpoint, where static scales are needed.
    `sizes`, `memory_limit` and `weight_streaming` are for runtimes that build engines.
    """

    checkpoint: str | None = None
    precision: str = "bf16"
    component_precision: Mapping[str, str] = field(default_factory=dict)
    runtime: str = "auto"
    targets: tuple[str, ...] = ()
    sizes: SizeRange = field(default_factory=SizeRange)
    calibration: Path | None = None
    memory_limit: int | None = None
    weight_streaming: bool = False


def build(request: BuildRequest, destination: Path, progress: Progress) -> Bundle:
    """Build a bundle at `destination`; an earlier one there stays usable until the end.

    A build that was cut off continues where it was: pieces whose inputs have not changed are
    reused. Raises the errors of each step; `destination` then is as it was before.
    """
    runtime, targets = choose_builder(request.runtime, request.targets, request.precision)
    if request.checkpoint is not None:
        _check_apart(Path(request.checkpoint), destination)
    checkpoint = open_source(request.checkpoint)
    plan = make_plan(
        checkpoint,
        destination,
        runtime,
        targets,
        request.precision,
        request.component_precision,
        request.sizes,
    )
    plan.require_possible()
    for warning in plan.warnings:
        progress.note(f"{warning}.")
    with Staging(destination) as staging:
        session = _Session(request, runtime, targets, checkpoint, staging, progress)
        staging.commit(session.manifest())
    return open_bundle(destination)


def _check_apart(checkpoint: Path, destination: Path) -> None:
    """Refuse to replace the checkpoint, or a folder around it, by the bundle."""
    if checkpoint.exists():
        source, target = checkpoint.resolve(), destination.resolve()
        if source == target or target in source.parents or source in target.parents:
            raise BundleError(
                f"The bundle {destination} and the checkpoint {checkpoint} overlap. "
                "Choose another --out."
            )


class _Session:
    """One build: what its pieces are made from, and the making of each."""

    def __init__(
        self,
        request: BuildRequest,
        runtime: Runtime,
        targets: tuple[str, ...],
        checkpoint: Checkpoint,
        staging: Staging,
        progress: Progress,
    ) -> None:
        from exporters.export import COMPONENTS
        from exporters.weights.bind import WeightFolder

        self.request = request
        self.runtime = runtime
        self.targets = targets
        self.checkpoint = checkpoint
        self.staging = staging
        self.progress = progress
        self.components = COMPONENTS
        self.tools = tool_versions()
        self.exporters_digest = exporters_digest()
        self.precisions = {name: self._precision(name) for name in COMPONENTS}
        self.latents = checkpoint.latents
        self.rope = RopeSpec(checkpoint.transformer.axes_dims, checkpoint.transformer.theta)
        self.weights = WeightFolder(staging.root / "onnx" / "weights")
        hashes = hash_checkpoint(checkpoint, progress)
        self.hashes, self.checkpoint_digest = hashes.files, hashes.digest

    def _precision(self, name: str) -> str:
        """What a component is built in; the plan has held it against what is possible."""
        from exporters.components.precisions import component_precision

        precision = self.request.component_precision.get(
            name, component_precision(name, self.request.precision)
        )
        return self.runtime.precision(self.targets[0], precision)

    def manifest(self) -> Manifest:
        """Make every piece that is not there yet, and describe them all."""
        tokenizers = {
            "clip": self._tokenizer("clip"),
            "t5": self._tokenizer("t5", self.checkpoint.settings.get("max_sequence_length")),
        }
        task = self.progress.task("Exporting components", total=len(self.components))
        components = {}
        for name in self.components:
            components[name] = self._component(name)
            task.advance()
        transformer = self.checkpoint.transformer
        gates = PRECISIONS[self.precisions["transformer"]]
        return Manifest(
            schema_version=SCHEMA_VERSION,
            family="flux.1",
            variant="dev" if transformer.guidance_embedding else "schnell",
            guidance_embedding=transformer.guidance_embedding,
            components=components,
            latents=self.latents,
            rope=self.rope,
            schedule=self.checkpoint.schedule,
            tokenizers=tokenizers,
            defaults=self.checkpoint.defaults,
            quality=QualityRecord(gates.min_psnr, gates.min_ssim, gates.min_sqnr),
            provenance={
                "checkpoint": {
                    "name": self._checkpoint_name(),
                    "layout": self.checkpoint.layout,
                    "sha256": self.checkpoint_digest,
                },
                "requested_precision": self.request.precision,
                "tools": {"fluxdeploy": __version__} | self.tools,
            },
        )

    def _checkpoint_name(self) -> str:
        name = self.request.checkpoint or DEFAULT_CHECKPOINT
        return name if name in DEMO_CHECKPOINTS else self.checkpoint.root.resolve().name

    def _tokenizer(self, name: str, max_length: int | None = None) -> TokenizerRecord:
        from exporters.tokenizers import canonical_tokenizer

        made = canonical_tokenizer(self.checkpoint.tokenizer(name), name, max_length)
        data = made.text.encode()
        path, piece = f"tokenizers/{name}.json", f"tokenizer.{name}"
        tools = {tool: importlib.metadata.version(tool) for tool in ("transformers", "tokenizers")}
        # The folder's files are in it by what transformers made of them.
        key = digest({"sha256": hashlib.sha256(data).hexdigest(), "tools": tools})
        files = self.staging.finished(piece, key)
        if files is None:
            target = self.staging.root / path
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(data)
            files = self.staging.record(piece, key, [target])
        return TokenizerRecord(
            path=path,
            max_length=made.max_length,
            pad_id=made.pad_id,
            prefix=made.prefix,
            suffix=made.suffix,
            padding_side=made.padding_side,
            truncation_side=made.truncation_side,
            files=files,
        )

    @cached_property
    def _ranges(self) -> tuple[Ranges, FileRecord]:
        """The transformer's activation ranges, read or measured, and their file in the bundle."""
        from exporters.calibrate.find import find_ranges, open_calibration
        from exporters.calibrate.range_file import read_ranges, write_ranges

        checkpoint, known = self.checkpoint, self.checkpoint_digest
        source = open_calibration(checkpoint, known, self.request.calibration)
        path = self.staging.root / _CALIBRATION
        key = digest(
            {"checkpoint": known, "source": repr(source), "exporters": self.exporters_digest}
        )
        files = self.staging.finished(_CALIBRATION, key)
        if files is None:
            state = self.staging.scratch(_CALIBRATION)
            write_ranges(find_ranges(source, checkpoint, known, state, self.progress), path)
            files = self.staging.record(_CALIBRATION, key, [path])
        return read_ranges(path, checkpoint, known), files[0]

    def _component(self, name: str) -> ComponentRecord:
        from exporters.components.precisions import component_compute
        from exporters.export import component_source

        precision = self.precisions[name]
        usual = self.runtime.compute(self.targets[0], precision)
        compute = component_compute(name, precision, usual)
        ranges = self._ranges[1] if PRECISIONS[precision].calibrated else None
        chain, weights = component_source(self.checkpoint, name, compute)
        specs = chain.inputs + chain.outputs
        profiles = self._profiles({d for spec in specs for d in spec.shape if isinstance(d, str)})
        engines = list_engines(self.runtime, self.targets, name, overall(profiles))
        gate = PRECISIONS[precision]
        sources = sorted({os.path.realpath(tensor.file) for tensor in weights.values()})
        key = digest(
            {
                "component": name,
                "precision": precision,
                "compute": compute,
                "ranges": ranges.sha256 if ranges else None,
                "config": repr((self.checkpoint.transformer, self.checkpoint.vae))
                + json.dumps([dict(p.config) for _, p in sorted(self.checkpoint.parts.items())]),
                "weights": [self.hashes[Path(source)] for source in sources],
                "weight_names": sorted({tensor.file.name for tensor in weights.values()}),
                "constants": repr((self.latents, self.rope, self.checkpoint.schedule)),
                "engines": [asdict(engine) for engine in engines],
                "settings": repr(
                    (profiles, self.request.memory_limit, self.request.weight_streaming)
                ),
                "tools": self.tools | {"exporters": self.exporters_digest},
            }
        )
        files = self.staging.finished(name, key)
        record = ComponentRecord(
            key=key,
            precision=precision,
            compute=compute,
            inputs=chain.inputs,
            outputs=chain.outputs,
            files=files or (),
            engines=engines,
            golden=GoldenRecord(f"golden/{name}.safetensors", gate.max_error, gate.min_cosine),
        )
        if files:
            self.progress.note(f"  {name}: unchanged")
            return record
        return self._make_component(name, record, profiles)

    def _profiles(self, symbols: set[str]) -> tuple[Mapping[str, DimensionRange], ...]:
        defaults = self.checkpoint.defaults
        if self.runtime.builds:
            return resolution_buckets(symbols, self.request.sizes, defaults, self.latents)
        return (any_size(symbols, defaults, self.latents),)

    def _make_component(
        self,
        name: str,
        record: ComponentRecord,
        profiles: tuple[Mapping[str, DimensionRange], ...],
    ) -> ComponentRecord:
        from exporters.export import export_component

        ledger = WeightPieces(self.staging, record.key)
        exported = export_component(
            self.checkpoint,
            name,
            record.precision,
            self.weights,
            compute=record.compute,
            ranges=self._ranges[0] if PRECISIONS[record.precision].calibrated else None,
            fused=self.runtime.fuses_attention(self.targets[0], record.compute),
            progress=self.progress,
            ledger=ledger,
        )
        paths = [f"onnx/{path}" for path in (exported.path, *exported.weights)]
        runtime, root, progress = self.runtime, self.staging.root, self.progress
        if runtime.builds:
            settings = BuildSettings(
                profiles, self.request.memory_limit, self.request.weight_streaming
            )
            paths += build_engines(runtime, name, record, exported, settings, root, progress)
        assert record.golden is not None
        self._write_golden(name, record)
        check_engine(runtime, name, record, root, progress)
        paths.append(record.golden.path)
        known = {
            f"onnx/weights/{linked}": self.hashes[source]
            for linked, source in self.weights.sources.items()
        }
        known |= ledger.hashes
        if PRECISIONS[record.precision].calibrated:
            ranges = self._ranges[1]
            paths.append(ranges.path)
            known[ranges.path] = ranges.sha256
        files = self.staging.record(name, record.key, paths, known)
        return replace(record, files=files)

    def _write_golden(self, name: str, record: ComponentRecord) -> None:
        from exporters.check.golden import golden_inputs, write_golden
        from exporters.export import component_source

        reference, weights = component_source(self.checkpoint, name, "fp32")
        task = self.progress.task(f"  {name}: PyTorch reference", total=len(reference.stages))
        vocabulary = {"clip": self.checkpoint.clip, "t5": self.checkpoint.t5}.get(name)
        inputs = golden_inputs(
            reference,
            None if vocabulary is None else vocabulary.vocab_size,
            self.latents,
            self.rope,
            self.checkpoint.schedule,
            record.engines[0].dimensions,
        )
        assert record.golden is not None
        path = self.staging.root / record.golden.path
        write_golden(path, reference, weights, inputs, task.advance)
