"""The engines of a component that is being built: which they are, their making, their checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engines import BuildSettings, EngineOptions, EngineSource, Runtime
from engines.golden import measure_component, require
from fluxdeploy.build.keys import weight_bytes
from fluxdeploy.bundle.manifest import ComponentRecord, DimensionRange, EngineRecord
from fluxdeploy.machine import read_memory
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from exporters.export import Exported

__all__ = ["build_engines", "check_engine", "list_engines"]


def list_engines(
    runtime: Runtime,
    targets: tuple[str, ...],
    component: str,
    dimensions: Mapping[str, DimensionRange],
) -> tuple[EngineRecord, ...]:
    """An engine for each target: one that serves several has fewer kernels merged."""
    version = runtime.version()
    return tuple(
        EngineRecord(
            runtime.name, version, target, _engine_path(runtime, target, component), dimensions
        )
        for target in targets
    )


def _engine_path(runtime: Runtime, target: str, component: str) -> str:
    if not runtime.builds:
        return f"onnx/{component}.onnx"
    return f"engines/{runtime.name}/{target}/{component}.engine"


def build_engines(
    runtime: Runtime,
    component: str,
    record: ComponentRecord,
    exported: Exported,
    settings: BuildSettings,
    root: Path,
    progress: Progress,
) -> list[str]:
    """Build a component's engines below `root`.

    Returns their files, with those that the runtime writes beside them. Raises what
    `Runtime.build` does.
    """
    source = EngineSource(
        component,
        PRECISIONS[record.precision],
        record.compute,
        root / "onnx" / exported.path,
        record.inputs,
        exported.quantized,
        exported.attentions,
        # The VAE's attention has one head, of all its channels.
        one_head=component.startswith("vae_"),
        weight_bytes=exported.weight_bytes,
    )
    paths = []
    for engine in record.engines:
        file = root / engine.path
        file.parent.mkdir(parents=True, exist_ok=True)
        made = runtime.build(source, (engine.target,), settings, file, progress)
        paths += [path.relative_to(root).as_posix() for path in made]
    return paths


def check_engine(
    runtime: Runtime, component: str, record: ComponentRecord, root: Path, progress: Progress
) -> None:
    """Run an engine below `root` where this machine can, and hold it against PyTorch.

    Raises `NumericError` where it is past the component's gate. Tells `progress` where nothing
    was checked, and why.
    """
    for engine in record.engines:
        available = runtime.availability(engine.target)
        if available.ok:
            break
    else:
        progress.note(f"  {component}: not checked, since {available.detail}")
        return
    weights = weight_bytes(root / "onnx", component)
    needed, free = runtime.opening_memory(engine.target, weights), read_memory().available
    if free is not None and needed > free:
        progress.note(
            f"  {component}: not checked, since its engine needs about {needed / 2**30:.0f} GiB of "
            f"memory and {free / 2**30:.0f} GiB are free; run `fluxdeploy verify` where it fits"
        )
        return
    assert record.golden is not None
    with runtime.open(component, record, engine, root, EngineOptions()) as opened:
        require(component, measure_component(opened, root / record.golden.path), record.golden)
