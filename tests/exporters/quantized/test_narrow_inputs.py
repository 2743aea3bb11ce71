"""16 bits between operators where linears take their inputs in 8."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from exporters.calibrate.ranges import ActivationRanges
from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS
from exporters.components.run import run_reference
from exporters.export import specify
from tests.exporters.conftest import export_fused
from tests.exporters.numbers import SIZES, make_inputs
from tests.exporters.rounding import run_rounded
from tests.exporters.test_narrow import distance, typed


@pytest.mark.parametrize("precision", ["fp8-linears", "int8-dynamic"])
def test_it_is_as_near_to_pytorch_as_the_graph_with_casts(
    opened: Checkpoint,
    ranges: ActivationRanges,
    remembered_traces: Path,
    tmp_path: Path,
    precision: str,
) -> None:
    spec = specify(opened, COMPONENTS["transformer"], precision, "fp16")
    assert spec.layers is not None
    spec = spec.with_layers(dataclasses.replace(spec.layers, ranges=ranges))
    inputs = make_inputs(opened, "transformer", SIZES[1])
    chain, weights = COMPONENTS["transformer"].source(opened, "fp32")
    exact = run_reference(chain, weights, inputs)["velocity"]
    away = {}
    for casts in (False, True):
        folder = tmp_path / str(casts)
        folder.mkdir()
        export_fused(spec, folder, fused=True, casts=casts)
        away[casts] = distance(run_rounded(folder / "transformer.onnx", inputs)["velocity"], exact)
    nodes, _ = typed(tmp_path / "False" / "transformer.onnx")
    norms = [node for node in nodes if node.op_type == "LayerNormalization"]
    assert all(len(node.input) == 3 for node in norms)
    assert away[False] < 1.2 * away[True]
