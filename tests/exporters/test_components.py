"""What is declared of components, and what follows from it."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from exporters.components.registry import COMPONENTS


@pytest.mark.parametrize(
    ("component", "precision", "usual", "expected"),
    [
        ("t5", "int8-weights", "fp16", "fp32"),
        ("t5", "fp8-weights", "fp16", "fp32"),
        ("t5", "int8-weights", "bf16", "bf16"),
        ("t5", "fp16", "fp16", "fp16"),  # asked for
        ("transformer", "int8", "fp16", "fp16"),
        ("conditioner", "int8-weights", "fp16", "fp16"),
    ],
)
def test_a_quantized_t5_never_computes_in_float16(
    component: str, precision: str, usual: str, expected: str
) -> None:
    assert COMPONENTS[component].compute_type(precision, usual) == expected
