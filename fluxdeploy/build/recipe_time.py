"""What a recipe costs in time: a component's engine beside one that is made without the recipe."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from engines import EngineOptions, Runtime
from fluxdeploy.build.resolve import ComponentSpec
from fluxdeploy.build.run import BuildRun
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord
from fluxdeploy.bundle.recipe import Recipe
from fluxdeploy.bundle.tensorfile import read_header, read_tensor

if TYPE_CHECKING:
    from exporters.export import Exported
    from exporters.quality.layers import Layers

__all__ = ["tell_time"]

Array = NDArray[Any]

_MOST = 1 << 30
"""Bytes of weights that are written a second time for it, at most."""
_RUNS = 5


def tell_time(
    component: ComponentSpec,
    exported: Exported,
    record: ComponentRecord,
    engine: EngineRecord | None,
    run: BuildRun,
) -> None:
    """Tell the progress how long a component takes with its recipe and without, or why not.

    `exported` and `record` are what was made of it, with golden tensors, below the staging folder,
    `engine` the one that was run there, None where nothing here could run any. It is told and not
    written: what is built does not depend on when, or beside what else.
    """
    plain = _without_recipe(component)
    if plain is None:
        return
    name, runtime = component.name, component.runtime
    problem = _problem(runtime, engine, exported, record)
    if problem is not None or engine is None:
        run.progress.note(f"  {name}: what its recipe costs in time is not measured: {problem}")
        return
    assert record.golden is not None
    root, folder = run.staging.root, run.staging.scratch(f"{name}.plain")
    inputs = _golden_inputs(root / record.golden.path)
    task = run.progress.task(f"  {name}: timing it without its recipe")
    try:
        _export(component, plain, folder)
        with_recipe, without = (
            _seconds(runtime, name, record, engine, place, inputs) for place in (root, folder)
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    task.finish()
    run.progress.note(
        f"  {name}: on the golden inputs it takes {1000 * with_recipe:,.1f} ms with its recipe and "
        f"{1000 * without:,.1f} ms without"
    )


def _without_recipe(component: ComponentSpec) -> Layers | None:
    """The layers with nothing spared but what the format cannot have; None where that is all."""
    layers = component.export.layers
    assert layers is not None
    shapes = {p.name.removesuffix(".weight"): p.stored.shape for p in component.export.placements}
    odd = {
        name: left
        for name, left in layers.recipe.spared.items()
        if name in shapes and layers.format.problem(*shapes[name]) is not None
    }
    recipe = Recipe(odd)
    return None if recipe == layers.recipe else replace(layers, recipe=recipe, smoothing={})


def _problem(
    runtime: Runtime, engine: EngineRecord | None, exported: Exported, record: ComponentRecord
) -> str | None:
    """Why nothing can be timed, None where it can."""
    if engine is None:
        return "its engine was not run"
    if runtime.builds:
        return f"{runtime.name} would have to build a second engine"
    if runtime.emulates(engine.target, record.precision):
        return f"{runtime.name} only has the numbers of {record.precision} here, not its speed"
    if exported.weight_bytes > _MOST:
        size = f"{exported.weight_bytes / 2**30:.1f} GiB"
        return f"{size} of weights would have to be written a second time"
    return None


def _export(component: ComponentSpec, layers: Layers, folder: Path) -> None:
    from exporters.export import export_component
    from exporters.weights.bind import WeightFolder

    weights = WeightFolder(folder / "onnx" / "weights")
    export = component.export.with_layers(layers)
    export_component(export, weights, component.fused, stem=component.stem)


def _golden_inputs(path: Path) -> dict[str, Array]:
    file = read_header(path)
    names = [name for name in file.tensors if name.startswith("input.")]
    return {name.removeprefix("input."): read_tensor(file, name) for name in names}


def _seconds(
    runtime: Runtime,
    name: str,
    record: ComponentRecord,
    engine: EngineRecord,
    root: Path,
    inputs: Mapping[str, Array],
) -> float:
    """The least of several runs, after one that does not count."""
    with runtime.open(name, record, engine, root, EngineOptions()) as opened:
        opened.run(inputs)
        seconds = []
        for _ in range(_RUNS):
            started = time.perf_counter()
            opened.run(inputs)
            seconds.append(time.perf_counter() - started)
    return min(seconds)
