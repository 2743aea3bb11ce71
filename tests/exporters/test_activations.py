"""What is foretold of activations is near what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporters.checkpoint.config import TransformerConfig, VaeConfig
from exporters.components.activations import transformer_bytes, vae_decoder_bytes
from exporters.components.registry import COMPONENTS
from fluxdeploy.kernels import AttentionKernels, CallSizes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "plan_memory.json"
ROWS: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"]

# The sizes of benchmarks/plan_memory.py.
MIDDLING: Any = SimpleNamespace(
    controlnets=(),
    redux=None,
    transformer=TransformerConfig(64, 64, 512, 64, 2048, 2, 4, 256, 128, True, (8, 28, 28)),
    vae=VaeConfig(16, (64, 128, 256, 256), 2, 32, 0.3611, 0.1159),
    ip_adapter=None,
    t5=SimpleNamespace(d_model=256, d_ff=640, num_heads=8),
    clip=SimpleNamespace(
        hidden_size=128, intermediate_size=512, num_attention_heads=4, max_position_embeddings=77
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['kernels']}-{row['component']}")
def test_measured(row: dict[str, Any]) -> None:
    element = 2 if row["precision"] == "bf16" else 4
    count = COMPONENTS[row["component"]].activations
    planned = count(MIDDLING, CallSizes(**row["sizes"]), AttentionKernels(row["kernels"]), element)
    assert planned == row["planned"], "run benchmarks/plan_memory.py again"
    assert 1 / 1.2 <= planned / row["activations"] <= 1.5


def test_only_plain_attention_pays_for_scores() -> None:
    def grown(kernels: AttentionKernels) -> float:
        small, large = (
            transformer_bytes(MIDDLING, CallSizes(1, 512, image, 1), kernels, 2)
            for image in (512, 15872)
        )
        return large / small

    assert grown(AttentionKernels.PLAIN) > 100
    assert grown(AttentionKernels.ONNX_RUNTIME) == 16
    assert grown(AttentionKernels.TENSORRT) < 16
    assert grown(AttentionKernels.NATIVE) < 16


def test_the_vae_takes_one_picture_at_a_time() -> None:
    one, four = (
        vae_decoder_bytes(MIDDLING, CallSizes(batch, 512, 4096, 1), AttentionKernels.TENSORRT, 2)
        for batch in (1, 4)
    )
    assert one == four
