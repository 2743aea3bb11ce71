"""Attention as ONNX Runtime's own operator: where it comes, and what it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from exporters.bind import WeightFolder
from exporters.checkpoint import Checkpoint
from exporters.export import COMPONENTS, component_source, export_component
from exporters.reference import run_reference
from tests.exporters.numbers import SIZES, error, make_inputs, run
from tests.support.checkpoints import SHAPES

BLOCKS = SHAPES["dev"].double + SHAPES["dev"].single
NORMS = 4 * SHAPES["dev"].double + 2 * SHAPES["dev"].single

Fused = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def fused(shared_folder: Any, opened: Checkpoint) -> Fused:
    """`fused(component, precision)`: the ONNX file for ONNX Runtime on a CPU.

    `one_piece` is the `--no-split` transformer.
    """

    def make(component: str, precision: str) -> Path:
        name = "transformer" if component == "one_piece" else component
        folder = shared_folder.entry(
            f"fused-{component}-{precision}",
            lambda target: export_component(
                opened,
                name,
                precision,
                WeightFolder(target / "weights"),
                compute="fp32",
                split=component != "one_piece",
                fused=True,
            ),
        )
        return Path(folder) / f"{name}.onnx"

    return make


def operators(path: Path) -> Counter[tuple[str, str]]:
    nodes = onnx.load(path, load_external_data=False).graph.node
    return Counter((node.domain, node.op_type) for node in nodes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("component", ["transformer", "one_piece"])
def test_fused_attention_equals_pytorch(
    fused: Fused, opened: Checkpoint, component: str, size: tuple[int, ...]
) -> None:
    chain, weights = component_source(
        opened, "transformer", "fp32", split=component == "transformer"
    )
    inputs = make_inputs(opened, component, size)
    ((name, expected),) = run_reference(chain, weights, inputs).items()
    # The one-piece graph makes its RoPE tables in float32.
    bound = 2e-5 if component == "transformer" else 2e-4
    assert error(run(fused(component, "fp32"), inputs)[name], expected) < bound


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic"])
def test_every_block_has_one_attention_and_no_transposition(fused: Fused, precision: str) -> None:
    path = fused("transformer", precision)
    found = operators(path)
    assert found["com.microsoft", "MultiHeadAttention"] == BLOCKS
    assert found["com.microsoft", "RotaryEmbedding"] == 2 * BLOCKS
    assert not found["", "Softmax"]
    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    weights |= {n.output[0] for n in model.graph.node if set(n.input) & weights}
    turned = [node for node in model.graph.node if node.op_type == "Transpose"]
    assert {node.input[0] for node in turned} <= weights
    read = {name for node in model.graph.node for name in node.input} | {"velocity"}
    assert all(set(node.output) & read for node in model.graph.node), "a result nobody reads"


def test_fused_int8_computes_what_the_standard_graph_does(
    fused: Fused, opened: Checkpoint, tmp_path: Path
) -> None:
    weights = WeightFolder(tmp_path / "weights")
    export_component(opened, "transformer", "int8-dynamic", weights, compute="fp32")
    inputs = make_inputs(opened, "transformer", SIZES[1])
    expected = run(tmp_path / "transformer.onnx", inputs)["velocity"]
    found = run(fused("transformer", "int8-dynamic"), inputs)["velocity"]
    # A number that rounds the other way moves by a step of 8 bits.
    assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected)


def test_onnx_runtime_merges_the_norms_itself(fused: Fused, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(fused("transformer", "fp32"), options)
    found = operators(tmp_path / "optimized.onnx")
    assert found["", "SimplifiedLayerNormalization"] == NORMS
    assert not found["", "ReduceMean"]


def test_16_bits_and_other_components_stay_standard(fused: Fused) -> None:
    graphs = [("transformer", "fp16"), *((name, "fp32") for name in COMPONENTS)]
    graphs.remove(("transformer", "fp32"))
    for component, precision in graphs:
        assert {domain for domain, _ in operators(fused(component, precision))} == {""}
