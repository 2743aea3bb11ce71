"""The golden tensors of a component that is being built, and how far its engines may be off."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.golden import Deviation
from fluxdeploy.build.resolve import ComponentSpec
from fluxdeploy.build.run import BuildRun
from fluxdeploy.bundle.manifest import GoldenRecord, component_stem
from fluxdeploy.bundle.tensorfile import read_header, read_tensor
from fluxdeploy.precision import PRECISIONS

__all__ = ["golden_path", "read_gate", "write_golden_tensors"]

Array = NDArray[np.generic]

_CONTROLNET = "controlnet"
_UPSTREAM: Mapping[str, tuple[str, ...]] = {
    "conditioner": ("clip", "t5"),
    "transformer": (_CONTROLNET, "conditioner", "ip_adapter"),
    "ip_adapter": ("ip_adapter_encoder",),
}
"""Whose golden outputs a component's golden inputs are: static scales fit values of the network's
own, and cut off others."""

_TIMES = 2.0
"""How many times the error of an emulation an engine may have: it rounds at other places too."""


def golden_path(stem: str) -> str:
    """Where the golden tensors of a component are, in a bundle."""
    return f"golden/{stem}.safetensors"


def read_gate(root: Path, path: str) -> GoldenRecord:
    """The gate of golden tensors below `root`, which is written with them."""
    metadata = read_header(root / path).metadata
    return GoldenRecord(path, float(metadata["max_error"]), float(metadata["min_cosine"]))


def write_golden_tensors(component: ComponentSpec, run: BuildRun) -> None:
    """Write known inputs, and what PyTorch makes of them in float32.

    The gate is that of the precision, and wider where these numbers take it, wherever they are
    computed: an engine is held against what it was asked to compute, and pictures decide whether
    that is good enough.
    """
    from exporters.check.golden import golden_inputs, write_golden
    from exporters.components.run import run_samples
    from exporters.components.side_paths import run_side_paths
    from exporters.quality.emulate import Emulator

    checkpoint, declared = run.spec.checkpoint, component.export.component
    reference, weights = declared.source(checkpoint, "fp32")
    task = run.progress.task(f"  {component.name}: PyTorch reference", len(reference.stages))
    inputs = golden_inputs(
        component.export.chain,
        None if declared.vocabulary is None else declared.vocabulary(checkpoint),
        checkpoint.latents,
        checkpoint.rope,
        run.spec.schedule,
        component.engines[0].dimensions,
        _upstream(component.name, run),
    )
    enter = run_side_paths(reference, inputs)
    (outputs,) = run_samples(reference, weights, [inputs], enter, task.advance)
    row, layers = PRECISIONS[component.precision], component.export.layers
    max_error, min_cosine = row.max_error, row.min_cosine
    if layers is not None:
        emulator = Emulator(declared, checkpoint, component.compute)
        emulator.put_beside(run_side_paths(emulator.chain, inputs))
        (found,) = emulator.run([inputs], layers)
        for name, exact in outputs.items():
            off = Deviation.of(found[name], exact)
            max_error = max(max_error, _TIMES * off.max_error)
            # An error of twice the size has four times the power.
            min_cosine = min(min_cosine, 1 - _TIMES**2 * (1 - off.cosine))
    gate = {"max_error": f"{max_error:.4g}", "min_cosine": f"{max(min_cosine, 0.0):.8g}"}
    write_golden(run.staging.root / golden_path(component.stem), inputs, outputs, gate)


def _upstream(component: str, run: BuildRun) -> dict[str, Array]:
    given: dict[str, Array] = {}
    for name in _before(component):
        path = run.staging.root / golden_path(component_stem(name, run.spec.edition))
        if not path.is_file():
            continue
        file = read_header(path)
        for tensor in file.tensors:
            side, _, output = tensor.partition(".")
            if side == "output":
                given[output] = read_tensor(file, tensor)
    if "modulation" in given:  # of all timesteps: the first
        given["modulation"] = given["modulation"][0]
    return given


def _before(component: str) -> tuple[str, ...]:
    if component.startswith(_CONTROLNET):
        # What runs each step takes what its conditioner gives; and that, what encoders give.
        ends = component.endswith(("_conditioner", "_encoder"))
        return ("clip", "t5") if ends else (f"{component}_conditioner",)
    return _UPSTREAM.get(component, ())
