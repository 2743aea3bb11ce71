"""Working a plan out: from a checkpoint's headers, what a build of it takes and cannot do."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from fluxdeploy.build.plan.figures import (
    Beside,
    ComponentPlan,
    DiskPlan,
    Phase,
    Plan,
    RunMemory,
)
from fluxdeploy.build.plan.footprint import (
    WIDTHS,
    Footprint,
    count_elements,
    existing_folder,
    staged_bytes,
    weigh,
)
from fluxdeploy.build.plan.objections import find_impossible, find_remarks, find_shortages
from fluxdeploy.build.resolve import BuildSpec, ComponentSpec
from fluxdeploy.build.sizes import overall, resolution_buckets
from fluxdeploy.build.staging import find_manifest
from fluxdeploy.bundle.files import can_link
from fluxdeploy.bundle.manifest import (
    SYMBOLS,
    DimensionRange,
    Manifest,
)
from fluxdeploy.kernels import AttentionKernels, CallSizes
from fluxdeploy.machine import read_memory
from fluxdeploy.precision import PRECISIONS

__all__ = ["make_plan"]

_PROCESS = 800_000_000
"""Bytes of a build's process itself: PyTorch, and the traced graph of a full-size transformer."""

_QUANTIZING = 8
"""Bytes for each element of the tensor that is quantized: as it is stored, in float32, and twice
in 8 bits, as it is and transposed."""

_GRAPH, _STAGE = 100_000, 35_000
"""Bytes of an ONNX file, and of each of its stages."""


def make_plan(spec: BuildSpec, destination: Path, beside: Beside | None = None) -> Plan:
    """Plan a build at `destination`, of an edition with others `beside` it.

    What cannot be is in the plan's `problems`; `require_possible` raises it.
    """
    return _Planner(spec, destination, beside or Beside()).plan()


class _Planner:
    def __init__(self, spec: BuildSpec, destination: Path, beside: Beside) -> None:
        self.spec = spec
        self.beside = beside
        self.checkpoint = spec.checkpoint
        self.destination = destination
        self.components = {component.name: component for component in spec.components}
        self.dimensions = self._dimensions()
        self.usual, self.largest = self._calls()

    def plan(self) -> Plan:
        parts = {name: weigh(component.export) for name, component in self.components.items()}
        components = {name: self._component(name, part) for name, part in parts.items()}
        disk, reusable = self._disk(parts, components)
        build = tuple(self._phases(parts))
        run = self._run(components, largest=False)
        largest_run = self._run(components, largest=True)
        memory = read_memory()
        shortages, warnings = find_shortages(disk, reusable, build, memory, self.destination)
        warnings += find_remarks(self.spec, run, memory.available)
        return Plan(
            runtime=self.spec.runtime.name,
            targets=self.spec.targets,
            components=tuple(components.values()),
            disk=disk,
            build=build,
            free_memory=memory.available,
            usual=self.usual,
            largest=self.largest,
            run=run,
            largest_run=largest_run,
            impossible=tuple(find_impossible(self.spec, self.destination, self.beside.runs_here)),
            shortages=tuple(shortages),
            warnings=tuple(warnings),
        )

    def _dimensions(self) -> Mapping[str, DimensionRange]:
        """The sizes that engines are to take, by symbol, whatever the runtime."""
        defaults, latents = self.checkpoint.defaults, self.checkpoint.latents
        sizes = self.spec.request.sizes
        return overall(
            resolution_buckets(set(SYMBOLS), sizes, defaults, latents, self.spec.request.lora_rank)
        )

    def _calls(self) -> tuple[CallSizes, CallSizes]:
        """The usual one is one picture of the checkpoint's own size."""
        defaults, pixels = self.checkpoint.defaults, self.checkpoint.token_pixels
        image = (defaults.height // pixels) * (defaults.width // pixels)
        text, steps = defaults.max_sequence_length, defaults.num_inference_steps
        most = max(text, min(self.checkpoint.max_text_tokens, self.dimensions["S"].max))
        return (
            CallSizes(1, text, image, steps),
            CallSizes(self.dimensions["B"].max, most, self.dimensions["L"].max, steps),
        )

    def _resident(self, component: ComponentSpec, part: Footprint) -> int:
        """Bytes of a component's weights where it runs."""
        if not component.runtime.widens_weights(component.targets[0], component.precision):
            return part.graph
        return part.graph + WIDTHS[component.compute] * part.quantized

    def _component(self, name: str, part: Footprint) -> ComponentPlan:
        component = self.components[name]
        return ComponentPlan(
            name=name,
            precision=component.precision,
            compute=component.compute,
            parameters=part.parameters,
            linked=part.linked,
            written=part.written,
            engine=component.runtime.engine_size(part.graph),
            resident=self._resident(component, part),
            activations=self._activations(component, self.usual),
            largest_activations=self._activations(component, self.largest),
        )

    def _activations(self, component: ComponentSpec, sizes: CallSizes) -> int:
        count = component.export.component.activations
        if component.name == "transformer":
            # It alone reads the references of a picture.
            sizes = replace(sizes, image=(1 + self.checkpoint.references) * sizes.image)
        if component.export.component.part != "t5":
            # Behind the prompt's tokens come those of pictures.
            sizes = replace(sizes, text=sizes.text + self.checkpoint.picture_tokens)
        return count(self.checkpoint, sizes, component.kernels, WIDTHS[component.compute])

    def _disk(
        self, parts: Mapping[str, Footprint], components: Mapping[str, ComponentPlan]
    ) -> tuple[DiskPlan, int]:
        """The disk, and how many bytes of an earlier bundle the build will probably reuse."""
        folder = existing_folder(self.destination)
        files = {file for part in parts.values() for file in part.sources}
        shared = files & self.beside.files
        copied = sum(f.stat().st_size for f in files - shared if not can_link(f, folder))
        tokenizers = sum(len(made.text.encode()) for made in self.spec.tokenizers.values())
        graphs = sum(
            _GRAPH + _STAGE * len(component.export.chain.stages)
            for component in self.components.values()
        )
        disk = DiskPlan(
            written=sum(component.written for component in components.values()),
            copied=copied,
            engines=sum(component.engine for component in components.values()),
            other=tokenizers + graphs + sum(map(self._golden_bytes, self.components.values())),
            free=shutil.disk_usage(folder).free
            + staged_bytes(self.destination)
            - self.beside.taken,
            shared=sum(file.stat().st_size for file in shared),
        )
        earlier = find_manifest(self.destination)
        reusable = sum(
            component.written + component.engine
            for component in components.values()
            if earlier is not None and self._is_like(component, earlier)
        )
        return disk, reusable

    def _is_like(self, component: ComponentPlan, earlier: Manifest) -> bool:
        """Whether an earlier bundle has the component as it is to be built now."""
        record = earlier.stems().get(self.components[component.name].stem)
        return record is not None and (
            record.precision == component.precision
            and record.compute == component.compute
            and {(engine.runtime, engine.target) for engine in record.engines}
            == {(e.runtime, e.target) for e in self.components[component.name].engines}
        )

    def _golden_bytes(self, component: ComponentSpec) -> int:
        """The golden tensors' bytes; all are of 4 bytes an element."""
        from exporters.check.golden import golden_sizes

        chain = component.export.chain
        sizes = golden_sizes(self.checkpoint.latents, component.engines[0].dimensions)
        return sum(
            4 * count_elements(sizes[d] if isinstance(d, str) else d for d in spec.shape)
            for spec in chain.inputs + chain.outputs
        )

    def _phases(self, parts: Mapping[str, Footprint]) -> Iterator[Phase]:
        """The phases of the build, each for the component that takes most."""
        yield Phase("export", "transformer", _PROCESS)
        quantized = {
            name: part.largest_quantized for name, part in parts.items() if part.largest_quantized
        }
        if quantized:
            name = max(quantized, key=quantized.__getitem__)
            yield Phase("quantization", name, _PROCESS + _QUANTIZING * quantized[name])
        name, part = max(parts.items(), key=lambda item: item[1].largest_stage)
        stage = _PROCESS + part.largest_stage
        if any(PRECISIONS[c.precision].calibrated for c in self.components.values()):
            yield Phase("calibration", "transformer", stage + self._calibration())
        yield Phase("PyTorch reference", name, stage)
        building = {
            name: component.runtime.building_memory(parts[name].graph)
            for name, component in self.components.items()
            if component.runtime.builds
        }
        if building:
            name = max(building, key=building.__getitem__)
            yield Phase("engine", name, _PROCESS + building[name])
        opening = {
            name: component.runtime.opening_memory(component.targets[0], 4 * parts[name].parameters)
            for name, component in self.components.items()
        }
        name = max(opening, key=opening.__getitem__)
        component = self.components[name]
        if opening[name] and component.runtime.availability(component.targets[0]).ok:
            yield Phase("check", name, opening[name])

    def _calibration(self) -> int:
        """What the measuring of ranges holds besides a stage: what that computes, and of every
        sample the streams between stages and the modulation of all steps.
        """
        from exporters.calibrate.trajectory import default_calibration

        calibration, config = default_calibration(self.checkpoint), self.checkpoint.transformer
        pixels = self.checkpoint.token_pixels
        image = max((h // pixels) * (w // pixels) for h, w in calibration.sizes)
        image *= 1 + self.checkpoint.references
        sizes = CallSizes(1, self.usual.text, image, calibration.steps)
        transformer = self.components["transformer"].export.component
        running = transformer.activations(self.checkpoint, sizes, AttentionKernels.PLAIN, 4)
        rows = 2 * (sizes.text + image) + calibration.steps * config.modulation_rows
        samples = len(calibration.prompts) * len(calibration.sizes)
        return running + samples * 4 * rows * config.width

    def _run(self, components: Mapping[str, ComponentPlan], largest: bool) -> RunMemory:
        def activations(name: str) -> int:
            component = components[name]
            return component.largest_activations if largest else component.activations

        def together(names: tuple[str, ...]) -> int:
            weights = sum(components[name].resident for name in names)
            shared = [name for name in names if self.components[name].runtime.shares_scratch]
            own = sum(activations(name) for name in names if name not in shared)
            return weights + own + max(map(activations, shared), default=0)

        turns: dict[str, tuple[str, ...]] = {}
        for name, component in self.components.items():
            if turn := component.export.component.turn:
                turns[turn] = (*turns.get(turn, ()), name)
        return RunMemory(
            all_open=together(tuple(itertools.chain(*turns.values()))),
            low_vram=max(together(names) for names in turns.values()),
        )
