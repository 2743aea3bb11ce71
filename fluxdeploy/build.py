"""Building: a checkpoint becomes a bundle, piece by piece, each finished piece kept for a rerun."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines import EngineOptions, Runtime, choose_target, runtimes
from fluxdeploy import __version__
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.bundle.manifest import (
    SCHEMA_VERSION,
    ComponentRecord,
    DimensionRange,
    EngineRecord,
    GoldenRecord,
    LatentSpec,
    Manifest,
    RopeSpec,
    TensorSpec,
    TokenizerRecord,
)
from fluxdeploy.bundle.staging import Staging
from fluxdeploy.demo import DEFAULT_CHECKPOINT, DEMO_CHECKPOINTS
from fluxdeploy.errors import BundleError, UsageError
from fluxdeploy.gate import COMPONENT_GATES, measure_component, require
from fluxdeploy.progress import Progress
from fluxdeploy.source import check_family, hash_checkpoint, open_source
from fluxdeploy.text import TOKENIZER_FILES, load_clip_tokenizer, load_t5_tokenizer

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

__all__ = ["BuildRequest", "build"]

_WEIGHTS_OVERHEAD = 2.5
"""Memory to reckon with for a CPU session that opens, as a multiple of its float32 weights:
constants are folded and packed while the originals are still there. A safe estimate."""

_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


@dataclass(frozen=True)
class BuildRequest:
    """What to build. `checkpoint` None is the default, `target` None the best one here.

    `precision` is the transformer's and decides the others' (docs/bundle.md);
    `component_precision` overrides single ones.
    """

    checkpoint: str | None = None
    precision: str = "bf16"
    component_precision: Mapping[str, str] = field(default_factory=dict)
    runtime: str = "auto"
    target: str | None = None


def build(request: BuildRequest, destination: Path, progress: Progress) -> Bundle:
    """Build a bundle at `destination`; an earlier one there stays usable until the end.

    A build that was cut off continues where it was: pieces whose inputs have not changed are
    reused. Raises the errors of each step; `destination` then is as it was before.
    """
    runtime, target = _choose(request)
    if request.checkpoint is not None:
        _check_apart(Path(request.checkpoint), destination)
    with Staging(destination) as staging:
        checkpoint = open_source(request.checkpoint)
        session = _Session(request, runtime, target, checkpoint, staging, progress)
        staging.commit(session.manifest())
    return open_bundle(destination)


def _choose(request: BuildRequest) -> tuple[Runtime, str]:
    """The runtime and target to build for, which need not be able to run here."""
    if request.target is None:
        return choose_target(request.runtime)
    for runtime in runtimes(request.runtime):
        if request.target in runtime.targets:
            return runtime, request.target
    allowed = ", ".join(t for runtime in runtimes(request.runtime) for t in runtime.targets)
    raise UsageError(
        f"--target {request.target} is unknown to --runtime {request.runtime}; it takes {allowed}."
    )


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
        target: str,
        checkpoint: Checkpoint,
        staging: Staging,
        progress: Progress,
    ) -> None:
        from exporters.bind import WeightFolder
        from exporters.export import COMPONENTS

        self.request = request
        self.runtime = runtime
        self.target = target
        self.checkpoint = checkpoint
        self.staging = staging
        self.progress = progress
        self.components = COMPONENTS
        self.tools = _tool_versions()
        self.exporters_digest = _exporters_digest()
        for name in request.component_precision:
            if name not in COMPONENTS:
                raise UsageError(
                    f"--component-precision names {name!r}; the components are "
                    f"{', '.join(COMPONENTS)}."
                )
        vae, transformer = checkpoint.vae, checkpoint.transformer
        self.latents = LatentSpec(
            channels=vae.latent_channels,
            patch_size=2,
            spatial_factor=vae.spatial_factor,
            scaling_factor=vae.scaling_factor,
            shift_factor=vae.shift_factor,
        )
        check_family(checkpoint)
        self.rope = RopeSpec(transformer.axes_dims, transformer.theta)
        self.weights = WeightFolder(staging.root / "onnx" / "weights")
        hashes = hash_checkpoint(checkpoint, progress)
        self.hashes, self.checkpoint_digest = hashes.files, hashes.digest

    def manifest(self) -> Manifest:
        """Make every piece that is not there yet, and describe them all."""
        tokenizers = {
            "clip": self._tokenizer("clip", "tokenizer"),
            "t5": self._tokenizer("t5", "tokenizer_2"),
        }
        task = self.progress.task("Exporting components", total=len(self.components))
        components = {}
        for name in self.components:
            components[name] = self._component(name)
            task.advance()
        transformer = self.checkpoint.transformer
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

    def _tokenizer(self, name: str, folder: str) -> TokenizerRecord:
        source = self.checkpoint.tokenizer(name)
        contents = {
            file: (source / file).read_bytes()
            for file in TOKENIZER_FILES
            if (source / file).is_file()
        }
        if name == "clip":
            length = load_clip_tokenizer(source).max_length
        else:
            recorded = self.checkpoint.settings.get("max_sequence_length", 512)
            length = load_t5_tokenizer(source, recorded).max_length
        piece = f"tokenizer.{name}"
        key = _digest({file: hashlib.sha256(data).hexdigest() for file, data in contents.items()})
        files = self.staging.finished(piece, key)
        if files is None:
            target = self.staging.root / folder
            target.mkdir(exist_ok=True)
            for file, data in contents.items():
                (target / file).write_bytes(data)
            files = self.staging.record(piece, key, [target / file for file in contents])
        return TokenizerRecord(folder, length, files)

    def _component(self, name: str) -> ComponentRecord:
        from exporters.export import component_precision, component_source

        asked = self.request.component_precision.get(
            name, component_precision(name, self.request.precision)
        )
        precision = self.runtime.precision(self.target, asked)
        chain, weights = component_source(self.checkpoint, name, precision)
        path = f"onnx/{name}.onnx"
        golden = f"golden/{name}.safetensors"
        dimensions = self._dimensions(chain.inputs + chain.outputs)
        engine = EngineRecord(
            self.runtime.name, self.runtime.version(), self.target, path, dimensions
        )
        max_error, min_cosine = COMPONENT_GATES[precision]
        sources = sorted({os.path.realpath(tensor.file) for tensor in weights.values()})
        key = _digest(
            {
                "component": name,
                "precision": precision,
                "config": repr((self.checkpoint.transformer, self.checkpoint.vae))
                + json.dumps([dict(p.config) for _, p in sorted(self.checkpoint.parts.items())]),
                "weights": [self.hashes[Path(source)] for source in sources],
                "weight_names": sorted({tensor.file.name for tensor in weights.values()}),
                "constants": repr((self.latents, self.rope, self.checkpoint.schedule)),
                "engine": asdict(engine),
                "tools": self.tools | {"exporters": self.exporters_digest},
            }
        )
        files = self.staging.finished(name, key)
        record = ComponentRecord(
            key=key,
            precision=precision,
            inputs=chain.inputs,
            outputs=chain.outputs,
            files=files or (),
            engines=(engine,),
            golden=GoldenRecord(golden, max_error, min_cosine),
        )
        if files:
            self.progress.note(f"  {name}: unchanged")
            return record
        return self._make_component(name, record)

    def _make_component(self, name: str, record: ComponentRecord) -> ComponentRecord:
        from exporters.export import component_source, export_component
        from exporters.golden import golden_inputs, write_golden

        root = self.staging.root
        reference, weights = component_source(self.checkpoint, name, "fp32")
        exported = export_component(
            self.checkpoint, name, record.precision, self.weights, progress=self.progress
        )
        task = self.progress.task(f"  {name}: PyTorch reference", total=len(reference.stages))
        vocabulary = {"clip": self.checkpoint.clip, "t5": self.checkpoint.t5}.get(name)
        inputs = golden_inputs(
            reference,
            None if vocabulary is None else vocabulary.vocab_size,
            self.latents,
            self.rope,
            self.checkpoint.schedule,
        )
        assert record.golden is not None
        golden = root / record.golden.path
        write_golden(golden, reference, weights, inputs, task.advance)
        self._gate(name, record, golden)
        paths = [f"onnx/{path}" for path in (exported.path, *exported.weights)]
        known = {
            f"onnx/weights/{linked}": self.hashes[source]
            for linked, source in self.weights.sources.items()
        }
        files = self.staging.record(name, record.key, [*paths, golden], known)
        return replace(record, files=files)

    def _gate(self, name: str, record: ComponentRecord, golden: Path) -> None:
        """Run the engine on this machine where it can, and hold it against PyTorch."""
        available = self.runtime.availability(self.target)
        if not available.ok:
            self.progress.note(f"  {name}: not checked, since {available.detail}")
            return
        parameters = _weight_bytes(self.staging.root / "onnx", name)
        needed, free = parameters * _WEIGHTS_OVERHEAD, _available_memory()
        if self.target == "cpu" and free is not None and needed > free:
            self.progress.note(
                f"  {name}: not checked, since its engine needs about {needed / 2**30:.0f} GiB of "
                f"memory and {free / 2**30:.0f} GiB are free; run `fluxdeploy verify` where it fits"
            )
            return
        assert record.golden is not None
        with self.runtime.open(
            name, record, record.engines[0], self.staging.root, EngineOptions()
        ) as engine:
            require(name, measure_component(engine, golden), record.golden)

    def _dimensions(self, specs: tuple[TensorSpec, ...]) -> dict[str, DimensionRange]:
        """What ONNX Runtime takes: any size, up to where attention fills any machine's memory."""
        defaults, latents = self.checkpoint.defaults, self.latents
        step = latents.patch_size * latents.spatial_factor
        rows, columns = defaults.height // step, defaults.width // step
        text, most_text = defaults.max_sequence_length, 512
        side = 4096
        ranges = {
            "B": DimensionRange(1, 1, 64),
            "S": DimensionRange(1, text, max(text, most_text)),
            "L": DimensionRange(1, rows * columns, (side // step) ** 2),
            "T": DimensionRange(
                2, text + rows * columns, max(text, most_text) + (side // step) ** 2
            ),
            "N": DimensionRange(1, defaults.num_inference_steps, 1000),
        }
        for symbol, size in (("H", defaults.height), ("W", defaults.width)):
            ranges[symbol] = DimensionRange(step, size, side)
        for symbol, image in (("h", "H"), ("w", "W")):
            factor = latents.spatial_factor
            sizes = ranges[image]
            ranges[symbol] = DimensionRange(
                sizes.min // factor, sizes.opt // factor, sizes.max // factor
            )
        used = {d for spec in specs for d in spec.shape if isinstance(d, str)}
        return {symbol: ranges[symbol] for symbol in sorted(used)}


def _digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _tool_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _TOOLS}


def _exporters_digest() -> str:
    """SHA-256 of the exporters' own sources: another exporter makes other pieces.

    The training of the demo checkpoints is no part of an export.
    """
    import exporters

    root = Path(next(iter(exporters.__path__)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.is_relative_to(root / "training"):
            continue
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _weight_bytes(folder: Path, name: str) -> int:
    """Bytes of a component's weights in float32."""
    import onnx

    graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
    total = 0
    for tensor in graph.initializer:
        count = 4
        for size in tensor.dims:
            count *= size
        total += count
    return total


def _available_memory() -> int | None:
    """Bytes of memory that a new process can have; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    value = fields.get("MemAvailable", "").split()
    return int(value[0]) * 1024 if value else None
