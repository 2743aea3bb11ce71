"""Weights in 8 bits, against NumPy's and ml_dtypes' rounding."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from exporters.formats import FORMATS, Packed
from fluxdeploy.errors import CheckpointError

NARROW: dict[str, tuple[Any, float]] = {
    "F8_E4M3": (ml_dtypes.float8_e4m3fn, 448.0),
    "I8": (np.int8, 127.0),
}
FORMAT = {"F8_E4M3": "fp8", "I8": "int8"}
SCALES: dict[ir.DataType, Any] = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}
Floats = NDArray[np.float32]

every_type = pytest.mark.parametrize("dtype", NARROW)
every_scale = pytest.mark.parametrize("scale_type", SCALES, ids=lambda scale: scale.name)


def pack(
    weight: Floats, dtype: str, scale_type: ir.DataType, some: int = 10
) -> tuple[NDArray[Any], Floats]:
    """What is stored, [in, out], and the scales [out] as float32; `some` rows are given at once."""
    parts = (weight[start : start + some].copy() for start in range(0, len(weight), some))
    shape = weight.shape[0], weight.shape[1]
    packed = Packed(FORMATS[FORMAT[dtype]], scale_type)
    raw, scales = packed.pack(parts, shape, "layer.weight", pytest.fail)
    assert raw.flags.c_contiguous
    values = raw.view(NARROW[dtype][0])
    assert values.shape == weight.shape[::-1]
    return values, scales.view(SCALES[scale_type]).astype(np.float32)


def random_weight(rows: int, columns: int) -> Floats:
    """Rows of very different sizes."""
    random = np.random.RandomState(1)
    weight = random.standard_normal((rows, columns)) * 10.0 ** random.uniform(-1, 3, (rows, 1))
    return weight.astype(np.float32)


@every_type
@every_scale
def test_bytes_are_the_rounded_quotients(dtype: str, scale_type: ir.DataType) -> None:
    weight = random_weight(37, 53)
    values, scales = pack(weight, dtype, scale_type)
    narrow, end = NARROW[dtype]
    expected = (np.abs(weight).max(1) / np.float32(end)).astype(SCALES[scale_type])
    expected = expected.astype(np.float32)
    assert (scales == expected).all(), "the scale is rounded before it divides"
    quotients = np.clip(weight / expected[:, None], -end, end)
    if dtype == "I8":
        quotients = np.rint(quotients)
    assert values.tobytes() == quotients.T.astype(narrow, order="C").tobytes()
    assert np.abs(values.astype(np.float32)).max(0).min() > 0.98 * end, "the range is used"


@every_type
def test_every_bfloat16_is_rounded_as_by_ml_dtypes(dtype: str) -> None:
    narrow, end = NARROW[dtype]
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    row = every[np.abs(every) <= end]  # the end itself makes the scale 1
    assert row.size > 33_000
    values, scales = pack(np.stack([row, -row]), dtype, ir.DataType.FLOAT)
    assert (scales == 1).all()
    exact = np.rint(row) if dtype == "I8" else row
    assert values[:, 0].tobytes() == exact.astype(narrow).tobytes()
    assert values[:, 1].tobytes() == (-exact).astype(narrow).tobytes()


@every_type
@every_scale
def test_the_parts_that_a_weight_comes_in_do_not_matter(
    dtype: str, scale_type: ir.DataType
) -> None:
    weight = random_weight(37, 53)
    whole, scales = pack(weight, dtype, scale_type, some=37)
    for some in (1, 2, 36):
        values, same = pack(weight, dtype, scale_type, some)
        assert values.tobytes() == whole.tobytes()
        assert same.tobytes() == scales.tobytes()


@every_type
@every_scale
def test_rows_of_zeros_stay_zero(dtype: str, scale_type: ir.DataType) -> None:
    weight = random_weight(5, 8)
    weight[2] = 0
    values, scales = pack(weight, dtype, scale_type)
    assert scales[2] == 1
    assert (values[:, 2].astype(np.float32) == 0).all()
    assert (values[:, [0, 1, 3, 4]].astype(np.float32) != 0).any()


@every_type
def test_a_huge_value_costs_its_own_row_only(dtype: str) -> None:
    weight = random_weight(6, 8)
    calm, calm_scales = pack(weight, dtype, ir.DataType.BFLOAT16)
    weight[3, 4] = -3e38
    values, scales = pack(weight, dtype, ir.DataType.BFLOAT16)
    others = [0, 1, 2, 4, 5]
    assert (values[:, others] == calm[:, others]).all()
    assert (scales[others] == calm_scales[others]).all()
    assert values[4, 3] == -NARROW[dtype][1]
    assert np.isfinite(scales).all()
    assert scales[3] * NARROW[dtype][1] == pytest.approx(3e38, rel=1e-2)


@every_type
def test_small_rows_keep_a_normal_scale_in_fp16(dtype: str) -> None:
    """FP16 ends at 6e-8, and a scale of 0 would be divided by."""
    rows = [[1e-7, -3e-7, 2e-7], [1e-30, 0, 0], [1e-3, 2e-3, -5e-3]]
    weight = np.array(rows, np.float32)
    values, scales = pack(weight, dtype, ir.DataType.FLOAT16)
    assert (scales >= np.finfo(np.float16).smallest_normal).all()
    dequantized = values.astype(np.float32).T * scales[:, None]
    step = {"I8": 1.0, "F8_E4M3": 2.0**-9}[dtype]
    exact = np.abs(dequantized - weight) <= np.maximum(np.abs(weight) / 16, scales[:, None] * step)
    assert exact.all()


@every_type
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(dtype: str, value: float) -> None:
    weight = random_weight(4, 4)
    weight[1, 2] = value
    with pytest.raises(CheckpointError, match=r"layer\.weight holds NaN or infinity"):
        pack(weight, dtype, ir.DataType.FLOAT)


def test_what_fp16_cannot_scale_is_refused_by_name() -> None:
    weight = random_weight(4, 4)
    weight[1, 2] = -1e9
    with pytest.raises(CheckpointError, match=r"layer\.weight holds values up to 1e\+09.*bf16"):
        pack(weight, "I8", ir.DataType.FLOAT16)
    pack(weight, "I8", ir.DataType.BFLOAT16)


def test_the_largest_value_is_named_whichever_part_it_is_in() -> None:
    weight = random_weight(4, 4)
    weight[0, 1], weight[3, 2] = 1e8, -1e9
    with pytest.raises(CheckpointError, match=r"values up to 1e\+09.*bf16"):
        pack(weight, "I8", ir.DataType.FLOAT16, some=1)
    weight[3, 2] = np.nan
    with pytest.raises(CheckpointError, match="NaN"):
        pack(weight, "I8", ir.DataType.FLOAT16, some=1)
