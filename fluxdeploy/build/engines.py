"""The engines of a component that is being built: which they are, their making, their checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engines import BuildSettings, EngineOptions, EngineSource, Runtime
from engines.golden import measure_component, require
from engines.tensorrt.fusion import Expectation, check
from fluxdeploy.build.keys import weight_bytes
from fluxdeploy.build.plan import CPU_SESSION
from fluxdeploy.bundle.files import write_atomic
from fluxdeploy.bundle.manifest import ComponentRecord, DimensionRange, EngineRecord
from fluxdeploy.errors import EngineError
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
    """Build a component's engines below `root`, hold their kernels against what was asked.

    Returns their files, with the reports of their kernels. Raises `EngineError` for an engine that
    is made of other kernels, and what `Runtime.build` does.
    """
    source = EngineSource(component, record.precision, root / "onnx" / exported.path, record.inputs)
    expected = _expectation(component, record, exported)
    paths = []
    for engine in record.engines:
        file = root / engine.path
        file.parent.mkdir(parents=True, exist_ok=True)
        fusion = runtime.build(source, (engine.target,), settings, file, progress).fusion
        report = f"{engine.path.removesuffix('.engine')}.kernels.json"
        write_atomic(root / report, fusion.as_json())
        if problems := check(fusion, expected):
            raise EngineError(
                f"The {component} engine for {engine.target} is not the {record.precision} engine "
                f"that was asked for: {'; '.join(problems)}. Its kernels are listed in "
                f"{root / report}."
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
    needed, free = weight_bytes(root / "onnx", component) * CPU_SESSION, read_memory().available
    if engine.target == "cpu" and free is not None and needed > free:
        progress.note(
            f"  {component}: not checked, since its engine needs about {needed / 2**30:.0f} GiB of "
            f"memory and {free / 2**30:.0f} GiB are free; run `fluxdeploy verify` where it fits"
        )
        return
    assert record.golden is not None
    with runtime.open(component, record, engine, root, EngineOptions()) as opened:
        require(component, measure_component(opened, root / record.golden.path), record.golden)


def _expectation(component: str, record: ComponentRecord, exported: Exported) -> Expectation:
    """What the engine of a component must be made of, going by its precision and its graph."""
    quantization = PRECISIONS[record.precision].quantization
    gemms: dict[str, int] = {}
    # The VAE's one attention has a single head as wide as the network, which no kernel fuses.
    attention = None if component.startswith("vae_") else record.compute
    if quantization is not None:
        kind = {"nvfp4": "fp4"}.get(quantization.format, quantization.format)
        gemms[kind if quantization.activations else f"{kind}-weights"] = exported.quantized
        if quantization.attention:
            attention = "fp8" if kind == "fp4" else kind
    return Expectation(exported.attentions, attention, gemms, record.compute, exported.weight_bytes)
