"""Working a plan out: from a checkpoint's headers, what a build of it takes and cannot do."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engines import Runtime
from fluxdeploy.build.checkpoint import check_family
from fluxdeploy.build.plan.activations import Kernels, Workload, activation_bytes
from fluxdeploy.build.plan.figures import ComponentPlan, DiskPlan, Phase, Plan, RunMemory
from fluxdeploy.build.plan.footprint import (
    WIDTHS,
    Footprint,
    can_link,
    count_elements,
    existing_folder,
    staged_bytes,
    weigh,
)
from fluxdeploy.build.plan.objections import find_impossible, find_remarks, find_shortages
from fluxdeploy.build.sizes import SizeRange, overall, resolution_buckets
from fluxdeploy.bundle.manifest import MANIFEST_NAME, DimensionRange, Manifest, from_json
from fluxdeploy.errors import BundleError, UsageError
from fluxdeploy.machine import read_memory
from fluxdeploy.precision import PRECISIONS

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

__all__ = ["CPU_SESSION", "make_plan"]

CPU_SESSION = 2.5
"""Memory of a CPU session while it opens, as a multiple of its float32 weights: constants are
folded and packed while the originals are still there. A safe estimate."""

_PROCESS = 800_000_000
"""Bytes of a build's process itself: PyTorch, and the traced graph of a full-size transformer."""

_QUANTIZING = 8
"""Bytes for each element of the tensor that is quantized: as it is stored, in float32, and twice
in 8 bits, as it is and transposed."""

_ENGINE_BUILD = 3
"""Memory of TensorRT's builder as a multiple of the weights it is given, as measured."""
_ENGINE_OVERHEAD = 300_000_000
"""Bytes of the builder without any weights."""
_ENGINE_FILE = 12_000_000
"""Bytes of an engine besides its weights, at most: kernels, tactics, names."""

_GRAPH, _STAGE = 100_000, 35_000
"""Bytes of an ONNX file, and of each of its stages."""

_TOKENIZER = 3
"""Bytes of a bundle's `tokenizer.json` for one of the checkpoint's folder, at most: a piece of a
`spiece.model` has about 15 of them, and becomes 35."""

_GROUPS = (("clip", "t5", "conditioner"), ("transformer",), ("vae_decoder",))
"""What `--low-vram` has open at a time. The VAE's encoder is not run."""

# What `exporters.check.golden` makes: a 64x96 picture, two prompts of 16 tokens, two steps.
_GOLDEN = {"B": 2, "S": 16, "N": 2, "L": 24, "T": 40, "h": 8, "w": 12, "H": 64, "W": 96}


def make_plan(
    checkpoint: Checkpoint,
    destination: Path,
    runtime: Runtime,
    targets: tuple[str, ...],
    precision: str = "bf16",
    component_precisions: Mapping[str, str] | None = None,
    sizes: SizeRange | None = None,
) -> Plan:
    """Plan the build of `checkpoint` at `destination`, for `targets` of `runtime`.

    What cannot be is in the plan's `problems`; `require_possible` raises it. Raises `UsageError`
    for names, precisions and sizes that do not exist, and `CheckpointError` for a checkpoint that
    is incomplete.
    """
    return _Planner(
        checkpoint, destination, runtime, targets, precision, component_precisions or {}, sizes
    ).plan()


class _Planner:
    def __init__(
        self,
        checkpoint: Checkpoint,
        destination: Path,
        runtime: Runtime,
        targets: tuple[str, ...],
        precision: str,
        overrides: Mapping[str, str],
        sizes: SizeRange | None,
    ) -> None:
        from exporters.components.precisions import (
            check_precision,
            component_compute,
            component_precision,
        )
        from exporters.export import COMPONENTS

        check_family(checkpoint)
        for name in overrides:
            if name not in COMPONENTS:
                raise UsageError(
                    f"--component-precision names {name!r}; the components are "
                    f"{', '.join(COMPONENTS)}."
                )
        self.checkpoint = checkpoint
        self.destination = destination
        self.runtime = runtime
        self.targets = targets
        self.precisions = {}
        for name in COMPONENTS:
            asked = overrides.get(name, component_precision(name, precision))
            check_precision(name, asked)
            self.precisions[name] = runtime.precision(targets[0], asked)
        self.compute = {
            name: component_compute(name, used, runtime.compute(targets[0], used))
            for name, used in self.precisions.items()
        }
        self.ranges = self._ranges(sizes or SizeRange())
        self.usual, self.largest = self._workloads()

    def plan(self) -> Plan:
        parts = {
            name: weigh(self.checkpoint, name, precision, self.compute[name])
            for name, precision in self.precisions.items()
        }
        components = {name: self._component(name, part) for name, part in parts.items()}
        disk, reusable = self._disk(parts, components)
        build = tuple(self._phases(parts))
        run = self._run(components, largest=False)
        largest_run = self._run(components, largest=True)
        memory = read_memory()
        shortages, warnings = find_shortages(disk, reusable, build, memory, self.destination)
        warnings += find_remarks(self.runtime, self.targets, self.precisions, run, memory.available)
        impossible = find_impossible(self.runtime, self.targets, self.precisions, self.compute)
        return Plan(
            runtime=self.runtime.name,
            targets=self.targets,
            components=tuple(components.values()),
            disk=disk,
            build=build,
            free_memory=memory.available,
            usual=self.usual,
            largest=self.largest,
            run=run,
            largest_run=largest_run,
            impossible=tuple(impossible),
            shortages=tuple(shortages),
            warnings=tuple(warnings),
        )

    def _ranges(self, sizes: SizeRange) -> Mapping[str, DimensionRange]:
        """The sizes that the engines are to take, by symbol."""
        defaults, latents = self.checkpoint.defaults, self.checkpoint.latents
        return overall(resolution_buckets(set(_GOLDEN), sizes, defaults, latents))

    def _workloads(self) -> tuple[Workload, Workload]:
        """The usual one is one picture of the checkpoint's own size."""
        defaults, pixels = self.checkpoint.defaults, 2 * self.checkpoint.vae.spatial_factor
        image = (defaults.height // pixels) * (defaults.width // pixels)
        recorded = self.checkpoint.settings.get("max_sequence_length", 512)
        text, steps = defaults.max_sequence_length, defaults.num_inference_steps
        most = max(text, min(recorded, self.ranges["S"].max))
        return (
            Workload(1, text, image, steps),
            Workload(self.ranges["B"].max, most, self.ranges["L"].max, steps),
        )

    def _resident(self, name: str, part: Footprint) -> int:
        """Bytes of a component's weights where it runs.

        ONNX Runtime has integer products of its own, and widens all other quantized weights.
        """
        if self.runtime.builds or self.precisions[name] == "int8-dynamic":
            return part.graph
        return part.graph + WIDTHS[self.compute[name]] * part.quantized

    def _component(self, name: str, part: Footprint) -> ComponentPlan:
        return ComponentPlan(
            name=name,
            precision=self.precisions[name],
            compute=self.compute[name],
            parameters=part.parameters,
            linked=part.linked,
            written=part.written,
            engine=part.graph + _ENGINE_FILE if self.runtime.builds else 0,
            resident=self._resident(name, part),
            activations=self._activations(name, self.usual),
            largest_activations=self._activations(name, self.largest),
        )

    def _activations(self, name: str, workload: Workload) -> int:
        return activation_bytes(
            self.checkpoint, name, workload, self._kernels(name), WIDTHS[self.compute[name]]
        )

    def _kernels(self, name: str) -> Kernels:
        if self.runtime.builds:
            return Kernels.TENSORRT
        quantization = PRECISIONS[self.precisions[name]].quantization
        plain = quantization is not None and quantization.attention
        if plain or not self.runtime.fuses_attention(self.targets[0], self.compute[name]):
            return Kernels.PLAIN
        return Kernels.ONNX_RUNTIME

    def _disk(
        self, parts: Mapping[str, Footprint], components: Mapping[str, ComponentPlan]
    ) -> tuple[DiskPlan, int]:
        """The disk, and how many bytes of an earlier bundle the build will probably reuse."""
        folder = existing_folder(self.destination)
        files = {file for part in parts.values() for file in part.sources}
        copied = sum(file.stat().st_size for file in files if not can_link(file, folder))
        tokenizers = _TOKENIZER * sum(
            file.stat().st_size
            for name in ("clip", "t5")
            for file in self.checkpoint.tokenizer(name).iterdir()
            if file.is_file()
        )
        graphs = sum(_GRAPH + _STAGE * len(part.chain.stages) for part in parts.values())
        disk = DiskPlan(
            written=sum(component.written for component in components.values()),
            copied=copied,
            engines=sum(component.engine for component in components.values()),
            other=tokenizers + graphs + sum(map(self._golden_bytes, parts.values())),
            free=shutil.disk_usage(folder).free + staged_bytes(self.destination),
        )
        earlier = _earlier_manifest(self.destination)
        reusable = sum(
            component.written + component.engine
            for component in components.values()
            if earlier is not None and self._is_like(component, earlier)
        )
        return disk, reusable

    def _is_like(self, component: ComponentPlan, earlier: Manifest) -> bool:
        """Whether an earlier bundle has the component as it is to be built now."""
        record = earlier.components.get(component.name)
        return record is not None and (
            record.precision == component.precision
            and record.compute == component.compute
            and {(engine.runtime, engine.target) for engine in record.engines}
            == {(self.runtime.name, target) for target in self.targets}
        )

    def _golden_bytes(self, part: Footprint) -> int:
        """The golden tensors' bytes; all are of 4 bytes an element."""
        least = {symbol: span.min for symbol, span in self.ranges.items()}
        if not self.runtime.builds:
            least = {}
        sizes = {symbol: max(size, least.get(symbol, 1)) for symbol, size in _GOLDEN.items()}
        return sum(
            4 * count_elements(sizes[d] if isinstance(d, str) else d for d in spec.shape)
            for spec in part.chain.inputs + part.chain.outputs
        )

    def _phases(self, parts: Mapping[str, Footprint]) -> Iterator[Phase]:
        """The phases of the build, each for the component that takes most."""
        yield Phase("export", "transformer", _PROCESS)
        quantized = {
            name: part.largest_packed for name, part in parts.items() if part.largest_packed
        }
        if quantized:
            name = max(quantized, key=quantized.__getitem__)
            yield Phase("quantization", name, _PROCESS + _QUANTIZING * quantized[name])
        name, part = max(parts.items(), key=lambda item: item[1].largest_stage)
        stage = _PROCESS + part.largest_stage
        if any(PRECISIONS[precision].calibrated for precision in self.precisions.values()):
            yield Phase("calibration", "transformer", stage + self._calibration())
        yield Phase("PyTorch reference", name, stage)
        name, part = max(parts.items(), key=lambda item: item[1].graph)
        if self.runtime.builds:
            needed = _PROCESS + _ENGINE_OVERHEAD + _ENGINE_BUILD * part.graph
            yield Phase("engine", name, needed)
        if self.targets[0] == "cpu" and self.runtime.availability("cpu").ok:
            name, part = max(parts.items(), key=lambda item: item[1].parameters)
            yield Phase("check", name, int(CPU_SESSION * 4 * part.parameters))

    def _calibration(self) -> int:
        """What the measuring of ranges holds besides a stage: what that computes, and of every
        sample the streams between stages and the modulation of all steps.
        """
        from exporters.calibrate.trajectory import default_calibration

        calibration, config = default_calibration(self.checkpoint), self.checkpoint.transformer
        pixels = 2 * self.checkpoint.vae.spatial_factor
        image = max((h // pixels) * (w // pixels) for h, w in calibration.sizes)
        workload = Workload(1, self.usual.text, image, calibration.steps)
        running = activation_bytes(self.checkpoint, "transformer", workload, Kernels.PLAIN, 4)
        rows = 2 * (workload.text + image) + calibration.steps * config.modulation_rows
        samples = len(calibration.prompts) * len(calibration.sizes)
        return running + samples * 4 * rows * config.width

    def _run(self, components: Mapping[str, ComponentPlan], largest: bool) -> RunMemory:
        def activations(name: str) -> int:
            component = components[name]
            return component.largest_activations if largest else component.activations

        def together(names: tuple[str, ...]) -> int:
            # TensorRT's engines take turns with one block; ONNX Runtime's sessions keep their own.
            scratch = [activations(name) for name in names]
            weights = sum(components[name].resident for name in names)
            return weights + (max(scratch) if self.runtime.builds else sum(scratch))

        return RunMemory(
            all_open=together(tuple(itertools.chain(*_GROUPS))),
            low_vram=max(together(group) for group in _GROUPS),
        )


def _earlier_manifest(destination: Path) -> Manifest | None:
    path = destination / MANIFEST_NAME
    try:
        return from_json(path.read_text("utf-8"), str(path))
    except (OSError, ValueError, BundleError):
        return None
