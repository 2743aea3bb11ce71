"""Making a component: its graph and weights, engines, golden tensors, and the check of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from engines import BuildSettings
from fluxdeploy.build.engines import build_engines, check_engine, engine_source
from fluxdeploy.build.keys import content_key
from fluxdeploy.build.resolve import ComponentSpec
from fluxdeploy.build.run import BuildRun
from fluxdeploy.build.staging import Staging
from fluxdeploy.bundle.manifest import ComponentRecord, FileRecord, GoldenRecord
from fluxdeploy.precision import PRECISIONS

if TYPE_CHECKING:
    from exporters.export import Exported

__all__ = ["WeightArtifacts", "make_component"]


def make_component(component: ComponentSpec, run: BuildRun) -> ComponentRecord:
    """Make a component in the staging folder, or take over what has the same content key.

    Raises the errors of each step; what other components have finished stays.
    """
    row = PRECISIONS[component.precision]
    ranges = run.ranges[1].sha256 if row.calibrated else None
    chain = component.export.chain
    record = ComponentRecord(
        key=content_key(component, run.spec, run.hashes, ranges),
        precision=component.precision,
        compute=component.compute,
        inputs=chain.inputs,
        outputs=chain.outputs,
        files=(),
        engines=component.engines,
        golden=GoldenRecord(f"golden/{component.name}.safetensors", row.max_error, row.min_cosine),
    )
    files = run.staging.finished(component.name, record.key)
    if files:
        run.progress.note(f"  {component.name}: unchanged")
    else:
        files = _make(component, record, run)
    return replace(record, files=files)


def _make(
    component: ComponentSpec, record: ComponentRecord, run: BuildRun
) -> tuple[FileRecord, ...]:
    from exporters.export import export_component

    assert record.golden is not None
    staging, progress = run.staging, run.progress
    ranges, ranges_file = run.ranges if PRECISIONS[record.precision].calibrated else (None, None)
    artifacts = WeightArtifacts(staging, record.key)
    exported = export_component(
        component.export, run.weights, ranges, component.fused, progress, artifacts
    )
    paths = [f"onnx/{path}" for path in (exported.path, *exported.weights)]
    if run.spec.runtime.builds:
        paths += _build_engines(component, exported, run)
    _write_golden(component, record.golden, run)
    paths.append(record.golden.path)
    check_engine(run.spec.runtime, component.name, record, staging.root, progress)
    known = {
        f"onnx/weights/{linked}": run.hashes.files[source]
        for linked, source in run.weights.sources.items()
    }
    known |= artifacts.hashes
    if ranges_file is not None:
        paths.append(ranges_file.path)
        known[ranges_file.path] = ranges_file.sha256
    return staging.record(component.name, record.key, paths, known)


def _build_engines(component: ComponentSpec, exported: Exported, run: BuildRun) -> list[str]:
    request, root = run.spec.request, run.staging.root
    settings = BuildSettings(component.profiles, request.memory_limit, request.weight_streaming)
    source = engine_source(component.export, exported, root)
    return build_engines(run.spec.runtime, source, component.engines, settings, root, run.progress)


def _write_golden(component: ComponentSpec, golden: GoldenRecord, run: BuildRun) -> None:
    from exporters.check.golden import golden_inputs, write_golden

    checkpoint, declared = run.spec.checkpoint, component.export.component
    reference, weights = declared.source(checkpoint, "fp32")
    task = run.progress.task(f"  {component.name}: PyTorch reference", len(reference.stages))
    inputs = golden_inputs(
        reference,
        None if declared.vocabulary is None else declared.vocabulary(checkpoint),
        checkpoint.latents,
        checkpoint.rope,
        run.spec.schedule,
        component.engines[0].dimensions,
    )
    write_golden(run.staging.root / golden.path, reference, weights, inputs, task.advance)


class WeightArtifacts:
    """The converted weight files of one component, each an artifact of the staging folder."""

    def __init__(self, staging: Staging, key: str) -> None:
        self.hashes: dict[str, str] = {}
        self._staging, self._key = staging, key

    def finished(self, file: str) -> bool:
        return self._remember(self._staging.finished(f"weights.{file}", self._key) or ())

    def record(self, file: str, sha256: str) -> None:
        path = f"onnx/weights/{file}"
        known = {path: sha256}
        self._remember(self._staging.record(f"weights.{file}", self._key, [path], known))

    def _remember(self, files: tuple[FileRecord, ...]) -> bool:
        self.hashes |= {record.path: record.sha256 for record in files}
        return bool(files)
