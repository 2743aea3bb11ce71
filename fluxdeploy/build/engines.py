"""The engines of a component that is being built: which they are, their making, their checks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from engines import BuildSettings, EngineOptions, EngineSource, Runtime
from engines.golden import measure_component, require
from engines.tensorrt.fusion import Expectation, check
from fluxdeploy.build.plan import CPU_SESSION
from fluxdeploy.build.resolve import BuildSpec, ComponentSpec
from fluxdeploy.bundle.files import write_atomic
from fluxdeploy.bundle.manifest import ComponentRecord
from fluxdeploy.errors import EngineError
from fluxdeploy.machine import read_memory
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from exporters.export import Exported

__all__ = ["build_engines", "check_engine"]


def build_engines(
    component: ComponentSpec, exported: Exported, spec: BuildSpec, root: Path, progress: Progress
) -> list[str]:
    """Build a component's engines below `root`, hold their kernels against what was asked.

    Returns their files, with the reports of their kernels; none where the runtime opens the ONNX
    file. Raises `EngineError` for an engine that is made of other kernels, and what `Runtime.build`
    does.
    """
    runtime, request = spec.runtime, spec.request
    if not runtime.builds:
        return []
    settings = BuildSettings(component.profiles, request.memory_limit, request.weight_streaming)
    inputs = component.export.chain.inputs
    onnx = root / "onnx" / exported.path
    source = EngineSource(component.name, component.precision, onnx, inputs)
    expected = _expectation(component, exported)
    paths = []
    for engine in component.engines:
        file = root / engine.path
        file.parent.mkdir(parents=True, exist_ok=True)
        fusion = runtime.build(source, (engine.target,), settings, file, progress).fusion
        report = f"{engine.path.removesuffix('.engine')}.kernels.json"
        write_atomic(root / report, fusion.as_json())
        if problems := check(fusion, expected):
            raise EngineError(
                f"The {component.name} engine for {engine.target} is not the "
                f"{component.precision} engine that was asked for: {'; '.join(problems)}. Its "
                f"kernels are listed in {root / report}."
            )
        paths += [engine.path, report]
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
    needed, free = _weight_bytes(root / "onnx", component) * CPU_SESSION, read_memory().available
    if engine.target == "cpu" and free is not None and needed > free:
        progress.note(
            f"  {component}: not checked, since its engine needs about {needed / 2**30:.0f} GiB of "
            f"memory and {free / 2**30:.0f} GiB are free; run `fluxdeploy verify` where it fits"
        )
        return
    assert record.golden is not None
    with runtime.open(component, record, engine, root, EngineOptions()) as opened:
        require(component, measure_component(opened, root / record.golden.path), record.golden)


def _expectation(component: ComponentSpec, exported: Exported) -> Expectation:
    """What the engine of a component must be made of, going by its precision and its graph."""
    quantization = PRECISIONS[component.precision].quantization
    gemms: dict[str, int] = {}
    fused = component.export.component.fused_attention
    attention = component.compute if fused else None
    if quantization is not None:
        kind = {"nvfp4": "fp4"}.get(quantization.format, quantization.format)
        gemms[kind if quantization.activations else f"{kind}-weights"] = exported.quantized
        if quantization.attention:
            attention = "fp8" if kind == "fp4" else kind
    return Expectation(
        exported.attentions, attention, gemms, component.compute, exported.weight_bytes
    )


def _weight_bytes(folder: Path, name: str) -> int:
    """Bytes of a component's weights in float32."""
    import onnx

    graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
    return sum(4 * math.prod(tensor.dims) for tensor in graph.initializer)
