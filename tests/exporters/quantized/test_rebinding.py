"""Other weights in a graph that is there: the bytes of an export from nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from exporters.calibrate.ranges import ActivationRanges
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.checkpoint.lora import merge_loras
from exporters.components.registry import COMPONENTS
from exporters.export import ExportSpec, export_component, specify
from exporters.quality.layers import Smoothing
from exporters.weights.bind import WeightFolder
from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.errors import ExportError
from fluxdeploy.lora import LoraFile
from tests.exporters.quantized.conftest import ExportInto, Quantized
from tests.support.loras import write_lora


@pytest.fixture
def merged(opened: Checkpoint, tmp_path: Path) -> Checkpoint:
    return merge_loras(opened, [LoraFile(write_lora(tmp_path / "x.safetensors"), 0.5)])


def _spec(checkpoint: Checkpoint, precision: str, ranges: ActivationRanges) -> ExportSpec:
    spec = specify(checkpoint, COMPONENTS["transformer"], precision, "fp32")
    if spec.layers is None:
        return spec
    return spec.with_layers(dataclasses.replace(spec.layers, ranges=ranges))


def _bytes(graph: Path) -> Mapping[str, bytes]:
    files = [graph, *(graph.parent / "weights").iterdir()]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize(
    "precision", ["fp32", "int8", "int8-dynamic", "int8-weights", "int4-weights", "fp8"]
)
def test_a_graph_with_other_weights_is_one_made_from_nothing(
    precision: str,
    opened: Checkpoint,
    merged: Checkpoint,
    ranges: ActivationRanges,
    quantized: Quantized,
    export_into: ExportInto,
    tmp_path: Path,
) -> None:
    base = quantized(precision)
    wanted = _bytes(export_into(tmp_path / "wanted", precision, checkpoint=merged))
    assert wanted != _bytes(base)
    folder = WeightFolder(tmp_path / "found" / "weights")
    export_component(_spec(merged, precision, ranges), folder, earlier=base)
    graph = tmp_path / "found" / "transformer.onnx"
    assert _bytes(graph) == wanted
    again = WeightFolder(tmp_path / "again" / "weights")
    export_component(_spec(opened, precision, ranges), again, earlier=graph)
    assert _bytes(tmp_path / "again" / "transformer.onnx") == _bytes(base)


def test_a_weight_that_the_graph_widens_may_become_one_that_it_does_not(
    remembered_traces: Path, tmp_path: Path
) -> None:
    base = open_checkpoint(DEMO_CHECKPOINTS["demo:dev"])
    linear = "text_model.encoder.layers.0.self_attn.q_proj"
    stored = base.part("clip").weights[f"{linear}.weight"]
    assert stored.dtype == "BF16"
    rows, columns = stored.shape
    factors = {
        f"text_encoder.{linear}.lora_A.weight": torch.ones(1, columns),
        f"text_encoder.{linear}.lora_B.weight": torch.ones(rows, 1),
    }
    save_file(factors, tmp_path / "x.safetensors")
    merged = merge_loras(base, [LoraFile(tmp_path / "x.safetensors")])

    def export(checkpoint: Checkpoint, name: str, earlier: Path | None = None) -> Path:
        spec = specify(checkpoint, COMPONENTS["clip"], "fp32")
        export_component(spec, WeightFolder(tmp_path / name / "weights"), earlier=earlier)
        return tmp_path / name / "clip.onnx"

    first, wanted = export(base, "base"), export(merged, "wanted")
    found = export(merged, "found", first)
    assert _bytes(found) == _bytes(wanted)
    assert _bytes(export(base, "again", found)) == _bytes(first)


def test_moved_outliers_and_biases_follow_other_weights(
    opened: Checkpoint,
    merged: Checkpoint,
    ranges: ActivationRanges,
    traced: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("exporters.export.trace_chain", lambda chain: traced("fp32"))  # type: ignore[operator]
    names = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    factors = np.exp2(np.arange(96, dtype=np.float32) % 3 - 1)
    smoothing = dict.fromkeys(names, Smoothing(factors, 7.0))
    means = dict.fromkeys(names, factors / 8)

    def export(checkpoint: Checkpoint, name: str, earlier: Path | None = None) -> Path:
        spec = _spec(checkpoint, "int8", ranges)
        assert spec.layers is not None
        layers = dataclasses.replace(spec.layers, smoothing=smoothing, means=means)
        spec = spec.with_layers(layers)
        export_component(spec, WeightFolder(tmp_path / name / "weights"), earlier=earlier)
        return tmp_path / name / "transformer.onnx"

    base = export(opened, "base")
    assert _bytes(export(merged, "found", base)) == _bytes(export(merged, "wanted"))


def test_shared_scales_and_other_graphs_are_refused(
    opened: Checkpoint, ranges: ActivationRanges, quantized: Quantized, tmp_path: Path
) -> None:
    folder = WeightFolder(tmp_path / "weights")
    with pytest.raises(ExportError, match="share scales"):
        export_component(_spec(opened, "fp4", ranges), folder, earlier=quantized("fp4", "bf16"))
    spec = specify(opened, COMPONENTS["clip"], "fp32")
    with pytest.raises(ExportError, match=r"transformer\.onnx is not the graph"):
        export_component(spec, folder, earlier=quantized("int8-weights"))
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"x\.onnx"):
        export_component(spec, folder, earlier=tmp_path / "x.onnx")
