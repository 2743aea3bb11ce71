"""Making a component: its graph and weights, engines, golden tensors, and the check of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engines import BuildSettings
from fluxdeploy.build.engines import build_engines, check_engine, engine_source
from fluxdeploy.build.golden import golden_path, read_gate, write_golden_tensors
from fluxdeploy.build.keys import content_key
from fluxdeploy.build.recipe_time import tell_time
from fluxdeploy.build.resolve import ComponentSpec, graph_path
from fluxdeploy.build.run import BuildRun
from fluxdeploy.build.staging import Staging
from fluxdeploy.bundle.files import disk_errors
from fluxdeploy.bundle.manifest import ComponentRecord, FileRecord

if TYPE_CHECKING:
    from exporters.export import Exported

__all__ = ["WeightArtifacts", "make_component", "make_components"]

_DIGITS = 12
"""Of a file's SHA-256, in its name."""


def make_components(run: BuildRun, what: str) -> dict[str, ComponentRecord]:
    """All components of a run, by name, whose progress is called `what`."""
    task = run.progress.task(what, total=len(run.spec.components))
    components = {}
    for component in run.spec.components:
        components[component.name] = make_component(component, run)
        task.advance()
    return components


def make_component(component: ComponentSpec, run: BuildRun) -> ComponentRecord:
    """Make a component in the staging folder, or take over what has the same content key.

    Raises the errors of each step; what other components have finished stays.
    """
    calibration, layers = None, None
    calibration_file: tuple[FileRecord, ...] = ()
    if component.quantized:
        from exporters.quality.recipes import layers_of

        calibration, file = run.calibration
        calibration_file = (file,)
        recipe = calibration.recipes[component.name].recipe
        known = (
            found.get(component.name, {}) for found in (calibration.means, calibration.moments)
        )
        base = run.spec.checkpoint.unmerged
        layers = layers_of(component.asked, base, recipe, calibration.ranges, *known)
        component = replace(component, export=component.export.with_layers(layers))
    key = content_key(component, run.spec, run.hashes, layers)
    files = run.staging.finished(component.stem, key)
    if files:
        run.progress.note(f"  {component.name}: unchanged")
    else:
        files = _make(component, key, run)
    return replace(
        _record(component, key, run),
        files=files + calibration_file,
        recipe=None if calibration is None else calibration.recipes[component.name],
    )


def _record(component: ComponentSpec, key: str, run: BuildRun) -> ComponentRecord:
    """What is known of a component whose golden tensors are written."""
    chain = component.export.chain
    return ComponentRecord(
        key=key,
        precision=component.precision,
        compute=component.compute,
        inputs=chain.inputs,
        outputs=chain.outputs,
        files=(),
        engines=component.engines,
        golden=read_gate(run.staging.root, golden_path(component.stem)),
    )


def _make(component: ComponentSpec, key: str, run: BuildRun) -> tuple[FileRecord, ...]:
    from exporters.export import export_component

    staging, progress = run.staging, run.progress
    artifacts = WeightArtifacts(staging, key)
    earlier = None if run.earlier is None else run.earlier / graph_path(component.stem)
    exported = export_component(
        component.export,
        run.weights,
        component.fused,
        progress,
        artifacts,
        earlier,
        component.stem,
    )
    paths = [f"onnx/{path}" for path in (exported.path, *exported.weights)]
    if component.runtime.builds:
        paths += _build_engines(component, exported, run)
    write_golden_tensors(component, run)
    paths.append(golden_path(component.stem))
    record = _record(component, key, run)
    run_here = check_engine(
        component.runtime, component.name, record, staging.root, progress, component.stem
    )
    known = {
        f"onnx/weights/{linked}": run.hashes.files[source]
        for linked, source in run.weights.sources.items()
    }
    known |= artifacts.hashes
    files = staging.record(component.stem, key, paths, known)
    if component.quantized:
        tell_time(component, exported, record, run_here, run)
    return files


def _build_engines(component: ComponentSpec, exported: Exported, run: BuildRun) -> list[str]:
    request, root = run.spec.request, run.staging.root
    settings = BuildSettings(
        component.profiles, request.memory_limit, request.weight_streaming, request.strict
    )
    source = engine_source(component.export, exported, root)
    return build_engines(component.runtime, source, component.engines, settings, root, run.progress)


class WeightArtifacts:
    """The converted weight files of one component, each an artifact of the staging folder.

    A file has its content's hash in its name: editions share one with equal bytes, and none is ever
    written over another that an edition has.
    """

    def __init__(self, staging: Staging, key: str) -> None:
        self.hashes: dict[str, str] = {}
        self._staging, self._key = staging, key
        self._names: dict[str, str] = {}

    def finished(self, file: str) -> bool:
        files = self._staging.finished(f"weights.{file}", self._key) or ()
        self._remember(file, files)
        return bool(files)

    def record(self, file: str, sha256: str) -> None:
        written = self._staging.root / "onnx" / "weights" / file
        end = f".{sha256[:_DIGITS]}{written.suffix}"
        known = self._staging.holding(sha256, end)
        path = f"onnx/weights/{written.stem}{end}" if known is None else known
        with disk_errors("rename", written):
            os.replace(written, self._staging.root / path)
        files = self._staging.record(f"weights.{file}", self._key, [path], {path: sha256})
        self._remember(file, files)

    def stored_as(self, file: str) -> str:
        return self._names[file]

    def _remember(self, file: str, files: tuple[FileRecord, ...]) -> None:
        for record in files:
            self.hashes[record.path] = record.sha256
            self._names[file] = Path(record.path).name
