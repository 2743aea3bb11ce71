"""The engines of a component that is being built: their making, and their checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines import BuildSettings, EngineOptions, EngineSource, Runtime
from engines.golden import measure_component, require
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord
from fluxdeploy.machine import read_memory
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from exporters.export import Exported, ExportSpec

__all__ = ["build_engines", "check_engine", "engine_source", "weight_bytes"]


def engine_source(spec: ExportSpec, exported: Exported, root: Path) -> EngineSource:
    """What a component's engines are built from, and what they are asked to be."""
    return EngineSource(
        spec.name,
        PRECISIONS[spec.precision],
        spec.compute,
        root / "onnx" / exported.path,
        spec.chain.inputs,
        exported.quantized,
        exported.attentions,
        spec.component.one_head,
        exported.weight_bytes,
        exported.weights_only,
        exported.wide_attentions,
    )


def build_engines(
    runtime: Runtime,
    source: EngineSource,
    engines: Sequence[EngineRecord],
    settings: BuildSettings,
    root: Path,
    progress: Progress,
) -> list[str]:
    """Build a component's engines below `root`.

    Returns their files, with those that the runtime writes beside them. Raises what
    `Runtime.build` does.
    """
    paths = []
    for engine in engines:
        file = root / engine.path
        file.parent.mkdir(parents=True, exist_ok=True)
        made = runtime.build(source, (engine.target,), settings, file, progress)
        paths += [path.relative_to(root).as_posix() for path in made]
    return paths


def check_engine(
    runtime: Runtime,
    component: str,
    record: ComponentRecord,
    root: Path,
    progress: Progress,
    stem: str = "",
) -> EngineRecord | None:
    """Run an engine below `root` where this machine can, and hold it against PyTorch.

    stem: what the component's own files are called, where it is not the component's name. Returns
    the engine. Raises `NumericError` where it is past the component's gate. Tells `progress` where
    nothing was checked, and why.
    """
    for engine in record.engines:
        available = runtime.availability(engine.target)
        if available.ok:
            break
    else:
        progress.note(f"  {component}: not checked, since {available.detail}")
        return None
    weights = weight_bytes(root / "onnx", stem or component)
    needed, free = runtime.opening_memory(engine.target, weights), read_memory().available
    if free is not None and needed > free:
        progress.note(
            f"  {component}: not checked, since its engine needs about {needed / 2**30:.0f} GiB of "
            f"memory and {free / 2**30:.0f} GiB are free; run `fluxdeploy verify` where it fits"
        )
        return None
    assert record.golden is not None
    with runtime.open(component, record, engine, root, EngineOptions()) as opened:
        require(component, measure_component(opened, root / record.golden.path), record.golden)
    return engine


def weight_bytes(folder: Path, stem: str) -> int:
    """Bytes of a component's weights in float32, going by its graph."""
    import onnx

    graph = onnx.load(folder / f"{stem}.onnx", load_external_data=False).graph
    return sum(4 * math.prod(tensor.dims) for tensor in graph.initializer)
