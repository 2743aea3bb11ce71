"""What torch's exporter would do in vain is left out, and where it is not in vain it is done."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("diffusers")

import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from exporters.graph.lower import to_onnx


class Calculation(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def exchanged(x: Tensor) -> Tensor:
    whole = x.to(torch.float32).to(torch.int32).to(torch.int64)
    total = whole * 2
    total += torch.min(whole, whole * whole)
    return total.to(torch.float32) + x.square()


def seen_twice(x: Tensor) -> Tensor:
    product = x * 2
    shown = product[:, :2]
    product += 1
    return product * shown.sum()


def without_translation(x: Tensor) -> Tensor:
    return torch.diff(x)


@pytest.mark.parametrize(
    ("function", "decomposed"), [(exchanged, 0), (seen_twice, 1), (without_translation, 1)]
)
def test_the_numbers_are_torchs_however_a_program_is_lowered(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[Tensor], Tensor], decomposed: int
) -> None:
    calls = []
    decompose = ExportedProgram.run_decompositions
    monkeypatch.setattr(
        ExportedProgram,
        "run_decompositions",
        lambda self, *given: calls.append(1) or decompose(self, *given),
    )
    example = torch.empty(3, 5, device="meta")
    program = to_onnx(Calculation(function), (example,), ({0: Dim.DYNAMIC},), 22)
    assert len(calls) == decomposed
    x = np.random.default_rng(0).normal(0, 3, (4, 5)).astype(np.float32)
    model = ir.to_proto(program.model).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(found, function(torch.from_numpy(x)).numpy(), rtol=1e-6)
