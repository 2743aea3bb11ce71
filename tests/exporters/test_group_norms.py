"""Group norms as ONNX Runtime runs them best: where they come, and what they compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.graph.group_norms import split_group_norms
from tests.exporters.conftest import Exports
from tests.exporters.numbers import error, run

NORM = """
<ir_version: 10, opset_import: ["": 22]>
norm (float[B, 6, H, W] x) => (float[B, 6, H, W] y)
<float[6] scale = {0.5, -1, 2, 3, 0, 1}, float[6] bias = {1, 2, 0, -1, 5, 0.25}>
{
    y = GroupNormalization <num_groups = 3, epsilon = 1e-6> (x, scale, bias)
}
"""


def split(text: str) -> onnx.ModelProto:
    model = ir.from_onnx_text(text)
    split_group_norms(model)
    return ir.to_proto(model)


def expected(x: np.ndarray) -> np.ndarray:
    """In float64."""
    groups = x.astype(np.float64).reshape(len(x), 3, -1)
    groups = groups - groups.mean(axis=2, keepdims=True)
    groups = groups / np.sqrt((groups**2).mean(axis=2, keepdims=True) + 1e-6)
    scale, bias = np.array([[0.5, -1, 2, 3, 0, 1], [1, 2, 0, -1, 5, 0.25]])[..., None, None]
    return groups.reshape(x.shape) * scale + bias


@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize("width", [1, 1e-3])
def test_digits_stay_where_the_mean_is_large_or_all_is_small(
    tmp_path: Path, mean: float, width: float
) -> None:
    x = np.random.RandomState(1).standard_normal((2, 6, 20, 30)) * width + mean * width
    x = x.astype(np.float32)
    onnx.save(split(NORM), tmp_path / "split.onnx")
    assert error(run(tmp_path / "split.onnx", {"x": x})["y"], expected(x)) < 1e-5


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_only_what_onnx_runtime_alone_runs_has_them_split(exports: Exports, component: str) -> None:
    found = {}
    for fused in (False, True):
        path = exports(component, "fp32", fused=fused)
        nodes = onnx.load(path, load_external_data=False).graph.node
        found[fused] = [node.op_type for node in nodes]
    norms = found[False].count("GroupNormalization")
    assert norms > 0
    assert found[True].count("InstanceNormalization") == norms
    assert not {"GroupNormalization"} & {*found[True]} | {"InstanceNormalization"} & {*found[False]}
