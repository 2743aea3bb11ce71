"""What formats say of a weight and of an input, against what exported graphs have of them."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from exporters.calibrate.ranges import ActivationRanges
from exporters.check.readback import read_linears
from exporters.checkpoint import Checkpoint
from exporters.formats import FORMATS
from fluxdeploy.errors import CheckpointError
from fluxdeploy.precision import PRECISIONS
from tests.exporters.quantized.conftest import LINEARS, Quantized
from tests.exporters.quantized.test_quantized_graphs import groups

QUANTIZED = {n: row.quantization for n, row in PRECISIONS.items() if row.quantization}
COMPUTE = {"fp32": ir.DataType.FLOAT, "bf16": ir.DataType.BFLOAT16}

every_precision = pytest.mark.parametrize("precision", QUANTIZED)


@pytest.fixture(scope="module")
def weight_of(opened: Checkpoint) -> Callable[[str], Tensor]:
    def read(linear: str) -> Tensor:
        stored = opened.part("transformer").weights[f"{linear}.weight"]
        return torch.from_numpy(stored.read().reshape(stored.shape))

    return read


@every_precision
@pytest.mark.parametrize("compute", COMPUTE)
def test_a_weight_is_the_graphs_to_the_last_bit(
    quantized: Quantized, weight_of: Callable[[str], Tensor], precision: str, compute: str
) -> None:
    linears = read_linears(quantized(precision, compute))
    assert linears.keys() == LINEARS
    same = 0
    for name, linear in linears.items():
        weight = weight_of(name)
        given = weight.clone().requires_grad_()
        # Products of integers are scaled in float32, whatever is around them.
        dynamic = QUANTIZED[precision].activations == "dynamic"
        emulated = linear.format.emulate_weight(given, COMPUTE["fp32" if dynamic else compute])
        assert torch.equal(given, weight), "it is not written to"
        assert not torch.equal(emulated, weight)
        same += torch.equal(emulated, linear.dequantized().T)
    # Weights that share a scale have the one of the largest of them.
    assert same == len(groups() if precision == "fp4" else LINEARS)


@every_precision
def test_an_input_is_the_graphs_to_the_last_bit(
    quantized: Quantized, ranges: ActivationRanges, precision: str
) -> None:
    """Some values are past the end that static scales have."""
    activations = QUANTIZED[precision].activations
    for name, linear in read_linears(quantized(precision)).items():
        largest = ranges.inputs[name]
        x = 2.5 * largest * torch.randn(4, 48, generator=torch.Generator().manual_seed(3))
        emulated = linear.format.emulate_input(x, activations, largest)
        assert torch.equal(emulated, linear.narrow(x)), name
        assert torch.equal(emulated, x) == (activations is None), name


@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_are_rounded_as_one_is(name: str) -> None:
    """They are packed a part at a time."""
    weight = torch.randn(700, 64, generator=torch.Generator().manual_seed(4))
    weight[:, 0] = 5  # the largest of each, so that no scale depends on the others
    whole = FORMATS[name].emulate_weight(weight, ir.DataType.FLOAT)
    assert whole.shape == weight.shape
    for start in (0, 254, 256, 510, 698):
        part = weight[start : start + 2]
        alone = FORMATS[name].emulate_weight(part, ir.DataType.FLOAT)
        assert torch.equal(alone, whole[start : start + 2])


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_weight_is_refused(name: str) -> None:
    weight = torch.ones(4, 64)
    weight[1, 2] = torch.nan
    with pytest.raises(CheckpointError, match="holds NaN"):
        FORMATS[name].emulate_weight(weight, ir.DataType.FLOAT)
