"""Making a native engine: a graph's plan, the kernels of its steps, and one file with both."""

from __future__ import annotations

from pathlib import Path

import onnx_ir

from engines.base import EngineSource
from engines.native.compile import compile_kernels
from engines.native.match import match
from engines.native.pack import write_engine
from engines.native.report import check_shape, describe, find_widened
from engines.native.works import works_metadata
from fluxdeploy.bundle.files import write_atomic
from fluxdeploy.errors import EngineError
from fluxdeploy.native import native_errors
from fluxdeploy.progress import Progress

__all__ = ["build_engine"]


def build_engine(
    source: EngineSource, strict: bool, destination: Path, progress: Progress
) -> tuple[Path, ...]:
    """Build `destination`, and list its steps beside it. The errors are `Runtime.build`'s."""
    with native_errors(EngineError, f"{source.onnx} cannot be read", "Export it again."):
        model = onnx_ir.load(source.onnx)
    plan = match(model)
    check_shape(plan, source.component)
    widened = find_widened(plan, source)
    report = destination.with_suffix(".kernels.json")
    write_atomic(report, describe(plan, widened))
    if widened and strict:
        raise EngineError(
            f"The {source.component} engine is not the {source.precision.name} engine that was "
            f"asked for: {widened}. Its steps are listed in {report}."
        )
    if widened:
        progress.note(f"  {source.component}: {widened}; {report.name} has all steps")
    kernels = compile_kernels(plan, progress)
    cubins = {name: cubin for name, (_, cubin) in kernels.items()}
    metadata = works_metadata(plan, {name: kernel for name, (kernel, _) in kernels.items()})
    write_engine(destination, plan, model, cubins, metadata, progress)
    return destination, report
