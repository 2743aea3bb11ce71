"""INT4 weights: their bytes as ONNX reads them, their scales, and the products they are in."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

from engines.base import EngineOptions
from engines.onnxruntime import _session
from exporters.calibrate.trajectory import start_samples
from exporters.check.readback import read_linears
from exporters.checkpoint import Checkpoint
from exporters.formats import FORMATS, Packed
from fluxdeploy.errors import CheckpointError, ExportError
from fluxdeploy.progress import Progress
from tests.exporters.quantized.conftest import LINEARS, SHORT, ExportInto, Quantized
from tests.exporters.quantized.test_emulation import distance, run, to_int4
from tests.exporters.quantized.test_quantized_graphs import COMPUTE, Graph

Floats = NDArray[np.float32]
BLOCK = 32
SCALES: dict[ir.DataType, Any] = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}

every_scale = pytest.mark.parametrize("scale_type", SCALES, ids=lambda scale: scale.name)


def pack(
    weight: Floats, scale_type: ir.DataType = ir.DataType.FLOAT, some: int = 4
) -> tuple[Floats, Floats]:
    """Numbers [in, out] and block scales [in / 32, out]; `some` rows are given at once."""
    rows, columns = weight.shape
    parts = (weight[start : start + some].copy() for start in range(0, rows, some))
    packed = Packed(FORMATS["int4"], scale_type)
    codes, scales = packed.pack(parts, (rows, columns), "layer.weight", pytest.fail)
    numbers = helper.make_tensor("x", TensorProto.INT4, (columns, rows), codes.tobytes(), raw=True)
    return (
        numpy_helper.to_array(numbers).astype(np.float32),
        scales.view(SCALES[scale_type]).astype(np.float32).reshape(columns // BLOCK, rows),
    )


def dequantized(weight: Floats, scale_type: ir.DataType = ir.DataType.FLOAT) -> Floats:
    numbers, scales = pack(weight, scale_type)
    return (numbers * scales.repeat(BLOCK, 0)).T


def random_weight(rows: int, columns: int) -> Floats:
    """Rows of very different sizes."""
    random = np.random.RandomState(1)
    weight = random.standard_normal((rows, columns)) * 10.0 ** random.uniform(-1, 2, (rows, 1))
    return weight.astype(np.float32)


def noise_ratio(weight: Floats, found: Floats) -> float:
    """dB"""
    return 10 * math.log10(np.square(weight).sum() / np.square(found - weight).sum())


def from_largest(weight: Floats) -> Floats:
    """With the scale that maps a block's largest magnitude to 7."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    steps = np.abs(blocks).max(2, keepdims=True) / 7
    return (np.rint(blocks / steps) * steps).reshape(weight.shape)


@every_scale
@pytest.mark.parametrize("some", [2, 4, 38])
def test_numbers_are_the_nearest_to_the_quotients(some: int, scale_type: ir.DataType) -> None:
    weight = random_weight(38, 64)
    numbers, scales = pack(weight, scale_type, some)
    quotients = weight.T / scales.repeat(BLOCK, 0)
    assert (np.abs(numbers - np.clip(quotients, -8, 7)) < 0.50001).all()
    assert (numbers.min(), numbers.max()) == (-8, 7), "the whole range is used"
    # Little is cut off.
    assert np.abs(quotients).max() < 10


def test_the_parts_that_a_weight_comes_in_do_not_matter() -> None:
    weight = random_weight(38, 64)
    whole = pack(weight, some=38)
    for some in (2, 36):
        assert all((a == b).all() for a, b in zip(pack(weight, some=some), whole, strict=True))


@pytest.mark.parametrize(
    ("kind", "decibels", "gain"),
    [("gaussian", 21.25, 0.95), ("laplacian", 19.3, 0.85), ("outliers", 19.65, 0.75)],
)
def test_scales_lose_less_than_those_of_the_largest_value(
    kind: str, decibels: float, gain: float
) -> None:
    random = np.random.RandomState(0)
    shape = (128, 1024)
    weight = {
        "gaussian": random.standard_normal(shape),
        "laplacian": random.laplace(size=shape),
        "outliers": random.standard_normal(shape) * np.where(random.rand(*shape) < 1e-3, 10, 1),
    }[kind].astype(np.float32)
    found = dequantized(weight, ir.DataType.BFLOAT16)
    assert noise_ratio(weight, found) == pytest.approx(decibels, abs=0.2)
    assert noise_ratio(weight, found) > noise_ratio(weight, from_largest(weight)) + gain


def test_signs_are_used_to_the_end() -> None:
    """-8 has no positive twin: a block whose largest value is negative has finer steps."""
    weight = np.zeros((2, BLOCK), np.float32)
    weight[:, 0] = -8, 7
    weight[:, 1] = 5, -5
    numbers, scales = pack(weight)
    assert scales.tolist() == [[1, 1]]
    assert (numbers == weight.T).all()


def test_scales_are_never_zero_nor_infinite() -> None:
    for weight in (
        np.zeros((2, 64), np.float32),
        np.full((2, 64), 1e-42, np.float32),
        np.where(np.arange(128).reshape(2, 64) < 32, np.float32(3e38), np.float32(-1e-30)),
    ):
        for scale_type in (ir.DataType.FLOAT, ir.DataType.BFLOAT16):
            numbers, scales = pack(weight, scale_type)
            assert (scales >= np.finfo(np.float32).smallest_normal).all()
            found = (numbers * scales.repeat(BLOCK, 0)).T
            assert np.allclose(found, weight, rtol=0.1, atol=1e-37)


def test_small_blocks_keep_a_normal_scale_in_fp16() -> None:
    """FP16 ends at 6e-8, and a scale of 0 would be divided by."""
    weight = random_weight(4, 64)
    weight[1] = 1e-7
    _, scales = pack(weight, ir.DataType.FLOAT16)
    assert (scales >= np.finfo(np.float16).smallest_normal).all()
    found = dequantized(weight, ir.DataType.FLOAT16)
    assert noise_ratio(weight, found) > 19
    assert (found[1] == 0).all()


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_a_damaged_weight_is_refused_by_name(damage: float) -> None:
    weight = random_weight(4, 64)
    weight[1, 20] = damage
    with pytest.raises(CheckpointError, match=r"layer\.weight holds NaN or infinity"):
        pack(weight)


def test_what_fp16_cannot_scale_is_refused_by_name() -> None:
    weight = random_weight(4, 64)
    weight[1, 2] = -1e9
    with pytest.raises(CheckpointError, match=r"layer\.weight holds values up to 1e\+09.*bf16"):
        pack(weight, ir.DataType.FLOAT16)
    pack(weight, ir.DataType.BFLOAT16)


@pytest.mark.parametrize("compute", COMPUTE)
def test_only_the_weights_of_large_linears_are_in_blocks(
    quantized: Quantized, opened: Checkpoint, compute: str
) -> None:
    path = quantized("int4-weights", compute)
    graph = Graph(path)
    assert [(entry.domain, entry.version) for entry in graph.model.opset_import] == [("", 22)]
    assert graph.model.ir_version >= 10, "the first with INT4"
    narrow = {n for n, t in graph.initializers.items() if t.data_type == TensorProto.INT4}
    assert narrow == {f"{linear}.weight" for linear in LINEARS}
    weights = opened.part("transformer").weights
    for name in narrow:
        rows, columns = weights[name].shape
        scales = graph.initializers[f"{name}.scale"]
        assert list(graph.initializers[name].dims) == [columns, rows]
        assert list(scales.dims) == [columns // BLOCK, rows]
        assert scales.data_type == COMPUTE[compute]
        (reader,) = graph.users[name]
        assert (reader.op_type, list(reader.input)) == ("DequantizeLinear", [name, scales.name])
        assert {a.name: a.i for a in reader.attribute} == {"axis": 0, "block_size": BLOCK}
        (product,) = graph.users[reader.output[0]]
        assert (product.op_type, product.input[1]) == ("MatMul", reader.output[0])
        assert graph.quantizer(product.input[0]) is None


def test_other_tools_open_the_file_and_find_two_numbers_a_byte(
    quantized: Quantized, opened: Checkpoint
) -> None:
    (file,) = (quantized("int4-weights").parent / "weights").iterdir()
    tensors = load_file(file)
    for linear in LINEARS:
        rows, columns = opened.part("transformer").weights[f"{linear}.weight"].shape
        codes = tensors[f"{linear}.weight"]
        assert (codes.dtype, codes.shape) == (torch.uint8, (columns, rows // 2))
        assert tensors[f"{linear}.weight.scale"].shape == (columns // BLOCK, rows)


@pytest.mark.parametrize("compute", COMPUTE)
def test_weights_come_back(quantized: Quantized, opened: Checkpoint, compute: str) -> None:
    path = quantized("int4-weights", compute)
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    linears = read_linears(path)
    assert linears.keys() == LINEARS
    for name, linear in linears.items():
        stored = opened.part("transformer").weights[f"{name}.weight"]
        weight = torch.from_numpy(stored.read().reshape(stored.shape))
        assert linear.fits(*weight.shape)
        wide, scales = (
            found[f"{name}.{part}"].astype(np.float32) for part in ("weight", "weight.scale")
        )
        exact = wide * scales.repeat(BLOCK, 0)
        assert (linear.dequantized().numpy() == exact).all(), name
        assert noise_ratio(weight.numpy(), exact.T) > 19, name
        x = torch.randn(3, 32)
        assert torch.equal(linear.narrow(x), x)


def test_onnxruntime_multiplies_in_4_bits_with_inputs_in_float32(
    quantized: Quantized, opened: Checkpoint, tmp_path: Path
) -> None:
    path = quantized("int4-weights")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    kinds = Counter(node.op_type for node in optimized.graph.node)
    assert kinds["MatMulNBits"] == len(LINEARS)
    assert kinds["DequantizeLinear"] == 0
    inputs = start_samples(opened, SHORT, Progress(quiet=True))[1].inputs(0)
    session = _session(path, "cpu", EngineOptions(threads=1), "transformer", "int4-weights")
    (found,) = session.run(["velocity"], inputs)
    # Of inputs in 8 bits there would be 0.5% left.
    assert distance(found, run(path, inputs)["velocity"]) < 1e-4


def test_another_width_is_refused_in_words(
    export_into: ExportInto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int4 = FORMATS["int4"]
    assert int4.problem(98, 320) is None
    assert "takes 80 numbers and gives 96; INT4 needs multiples of 32 and 2" in str(
        int4.problem(96, 80)
    )
    assert int4.problem(97, 320) is not None
    monkeypatch.setattr("exporters.formats.int4._BLOCK", 1000)
    with pytest.raises(ExportError, match=r"multiples of 1000 and 2\. Use int8-weights\."):
        export_into(tmp_path, "int4-weights", "bf16")


def test_the_search_is_the_one_written_out_in_float64() -> None:
    weight = torch.from_numpy(random_weight(38, 96))
    found = FORMATS["int4"].emulate_weight(weight, ir.DataType.FLOAT)
    assert distance(found, to_int4(weight)) < 1e-4
