"""Exported transformers in bfloat16 and FP8, with recipes of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from exporters.calibrate.ranges import ActivationRanges
from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS
from exporters.export import export_component, specify
from exporters.quality.layers import Smoothing
from exporters.weights.bind import WeightFolder
from fluxdeploy.bundle.recipe import NOTHING, WEIGHTS, Recipe
from tests.exporters.quantized.conftest import (
    Quantized,
    export_into,
    opened,
    quantized,
    ranges,
    source,
    traced,
)

__all__ = ["export_into", "opened", "quantized", "ranges", "source", "traced"]

DOUBLE, SINGLE = "transformer_blocks.0.", "single_transformer_blocks.0."

SPARED = {
    # One of each group of products, of each kind of block.
    "linears": {
        f"{DOUBLE}attn.to_k": NOTHING,
        f"{DOUBLE}attn.to_add_out": WEIGHTS,
        f"{DOUBLE}ff_context.net.2": NOTHING,
        f"{SINGLE}attn.to_v": WEIGHTS,
        f"{SINGLE}proj_out": NOTHING,
    },
    "attentions": {f"{DOUBLE}attn": NOTHING, f"{SINGLE}attn": NOTHING},
}

GRAPHS = ("bf16", "fp8", "fp8-linears", "fp8-weights", *SPARED, "smoothed")
"""What `graphs` takes."""

Graphs = Callable[[str], Path]


@pytest.fixture(scope="session")
def graphs(
    shared_folder: Any,
    opened: Checkpoint,
    ranges: ActivationRanges,
    traced: Callable[[str], Any],
    quantized: Quantized,
) -> Graphs:
    """`graphs(name)`: the ONNX file of one of `GRAPHS`, not to be written to."""

    def export(folder: Path, name: str) -> None:
        spec = specify(opened, COMPONENTS["transformer"], "fp8")
        assert spec.layers is not None
        layers = replace(spec.layers, ranges=ranges)
        if name in SPARED:
            layers = layers.sparing(SPARED[name])
        else:
            layers = replace(layers, smoothing=smoothing(), recipe=Recipe())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("exporters.export.trace_chain", lambda _: traced("bf16"))
            export_component(spec.with_layers(layers), WeightFolder(folder / "weights"))

    def make(name: str) -> Path:
        if name not in SPARED and name != "smoothed":
            return quantized(name, "bf16")
        folder = shared_folder.entry(f"native-{name}", lambda target: export(target, name))
        return Path(folder) / "transformer.onnx"

    def smoothing() -> dict[str, Smoothing]:
        random = np.random.RandomState(5)
        found = {}
        inputs = [[f"{SINGLE}attn.to_{part}" for part in "qkv"] + [f"{SINGLE}proj_mlp"]]
        inputs += [[f"{DOUBLE}ff.net.2"]]
        for linears in inputs:
            columns = spec_of(linears[0])
            factors = np.exp2(random.randint(-3, 2, columns)).astype(np.float32)
            found |= dict.fromkeys(linears, Smoothing(factors, 8.0))
        return found

    def spec_of(linear: str) -> int:
        _, weights = COMPONENTS["transformer"].source(opened, "bf16")
        return weights[f"{linear}.weight"].shape[1]

    return make
