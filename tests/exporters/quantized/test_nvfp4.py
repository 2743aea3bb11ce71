"""FP4: the bytes of weights against ml_dtypes' and ONNX's, and the graph that TensorRT fuses."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from exporters.calibrate.ranges import ActivationRanges
from exporters.check.readback import read_linears
from exporters.checkpoint import Checkpoint
from exporters.formats import FORMATS, Packed
from fluxdeploy.bundle.tensorfile import read_header
from fluxdeploy.errors import CheckpointError, ExportError
from tests.exporters.quantized.conftest import LINEARS, ExportInto, Quantized
from tests.exporters.quantized.test_quantized_graphs import COMPUTE, Graph, groups

Floats = NDArray[np.float32]
BLOCK = 16


def unpacked(raw: NDArray[np.uint8], shape: tuple[int, ...], kind: int) -> Floats:
    """Raw bytes as ONNX reads them."""
    tensor = helper.make_tensor("x", kind, shape, raw.tobytes(), raw=True)
    return numpy_helper.to_array(tensor).astype(np.float32)


def pack(
    weight: Floats, largest: float | None = None, some: int = 4
) -> tuple[Floats, Floats, np.float32]:
    """E2M1 numbers [in, out], block scales [in / 16, out] and the scale for all.

    `some` rows are given at once.
    """
    rows, columns = weight.shape
    parts = (weight[start : start + some].copy() for start in range(0, rows, some))
    largest = float(np.abs(weight).max()) if largest is None else largest
    packed = Packed(FORMATS["nvfp4"], ir.DataType.BFLOAT16)
    codes, scales, whole = packed.pack(parts, (rows, columns), "layer.weight", lambda: largest)
    return (
        unpacked(codes, (columns, rows), TensorProto.FLOAT4E2M1),
        unpacked(scales, (columns // BLOCK, rows), TensorProto.FLOAT8E4M3FN),
        whole.view(np.float32)[0],
    )


def dequantized(weight: Floats) -> Floats:
    numbers, scales, whole = pack(weight)
    return (numbers * scales.repeat(BLOCK, 0) * whole).T


def random_weight(rows: int, columns: int) -> Floats:
    """Rows of very different sizes."""
    random = np.random.RandomState(1)
    weight = random.standard_normal((rows, columns)) * 10.0 ** random.uniform(-1, 2, (rows, 1))
    return weight.astype(np.float32)


@pytest.mark.parametrize("some", [2, 4, 38])
def test_numbers_and_scales_are_rounded_as_by_ml_dtypes(some: int) -> None:
    weight = random_weight(38, 64)
    numbers, scales, whole = pack(weight, some=some)
    assert whole == np.abs(weight).max() / np.float32(2688)
    blocks = weight.T.reshape(4, BLOCK, 38)
    expected = (np.abs(blocks).max(1) / np.float32(6) / whole).astype(ml_dtypes.float8_e4m3fn)
    assert (scales == expected.astype(np.float32)).all()
    assert scales.max() == 448
    quotients = blocks / (scales * whole)[:, None]
    narrow = quotients.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert (numbers == narrow.reshape(64, 38)).all()
    assert (np.signbit(numbers) == np.signbit(weight.T)).all()


def test_ties_go_to_even_codes() -> None:
    """And what is past the end stays at it. 6 makes the block's scale 1."""
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
    even = [0, 1, 1, 2, 2, 4, 4]
    weight = np.zeros((2, 4 * BLOCK), np.float32)
    for column, step in enumerate((0, -1, 1)):
        block = weight[0, column * BLOCK :][:BLOCK]
        block[:7] = np.nextafter(ties, np.float32(step * 100)) if step else ties
        block[7:14], block[14] = -block[:7], 6
    weight[1, -BLOCK] = 2688  # makes the scale for all 1
    numbers, scales, whole = pack(weight)
    assert whole == 1
    assert (scales[:3, 0] == 1).all()
    assert numbers[:7, 0].tolist() == even
    assert (-numbers[7:14, 0]).tolist() == even
    below, above = (numbers[column * BLOCK :][:7, 0] for column in (1, 2))
    assert below.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4]
    assert above.tolist() == [0.5, 1, 1.5, 2, 3, 4, 6]


def test_errors_are_within_half_a_step() -> None:
    """Of a block's largest number the widest step is a third, and its scale may be 1/16 too small.

    Gaussian weights keep 20 dB.
    """
    weight = random_weight(64, 256)
    error = np.abs(dequantized(weight) - weight)
    blocks = np.abs(weight).reshape(64, -1, BLOCK).max(2).repeat(BLOCK, 1)
    assert (error <= blocks / 6 * (1 + 1 / 16) * 1.001).all()
    gaussian = np.random.RandomState(0).standard_normal((256, 512)).astype(np.float32)
    noise = np.square(dequantized(gaussian) - gaussian).sum()
    assert 10 * math.log10(np.square(gaussian).sum() / noise) == pytest.approx(20.4, abs=0.2)


def test_scales_are_never_zero_nor_infinite() -> None:
    for weight in (
        np.zeros((2, 32), np.float32),
        np.full((2, 32), 1e-42, np.float32),
        np.where(np.arange(64).reshape(2, 32) < 16, np.float32(3e38), np.float32(1e-30)),
    ):
        numbers, scales, whole = pack(weight)
        assert (scales > 0).all()
        assert 0 < whole < np.inf
        assert np.isfinite(numbers * scales.repeat(BLOCK, 0) * whole).all()
    assert not dequantized(np.zeros((2, 32), np.float32)).any()


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_a_damaged_weight_is_refused_by_name(damage: float) -> None:
    weight = random_weight(4, 32)
    weight[1, 20] = damage
    with pytest.raises(CheckpointError, match=r"layer\.weight holds NaN or infinity"):
        pack(weight)


def attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def block_scales(graph: Graph, node: onnx.NodeProto, compute: str) -> onnx.NodeProto:
    """The DequantizeLinear that makes the scales of one in blocks; a Cast follows in 16 bits."""
    source = graph.producers[node.input[1]]
    if compute != "fp32":
        assert source.op_type == "Cast"
        assert attributes(source) == {"to": COMPUTE[compute]}
        source = graph.producers[source.input[0]]
    assert source.op_type == "DequantizeLinear"
    assert attributes(source) == {}
    return source


@pytest.mark.parametrize("compute", COMPUTE)
def test_both_sides_of_a_product_are_in_blocks(
    quantized: Quantized, opened: Checkpoint, ranges: ActivationRanges, compute: str
) -> None:
    path = quantized("fp4", compute)
    graph = Graph(path)
    opsets = {entry.domain: entry.version for entry in graph.model.opset_import}
    assert opsets == {"": 23, "trt": 1}
    assert graph.model.ir_version == 11, "the first with E2M1"
    assert {n.op_type for n in graph.nodes if n.domain} == {"TRT_FP4DynamicQuantize"}
    narrow = {n for n, t in graph.initializers.items() if t.data_type == TensorProto.FLOAT4E2M1}
    assert narrow == {f"{linear}.weight" for linear in LINEARS}
    (file,) = (path.parent / "weights").iterdir()
    stored = read_header(file).tensors
    for group in groups():
        quantizers = set()
        for linear in group:
            name, (rows, columns) = f"{linear}.weight", shape_of(opened, linear)
            product = graph.product(linear)
            x, weight = (graph.producers[value] for value in product.input)
            assert weight.input[0] == name
            assert list(graph.initializers[name].dims) == [columns, rows]
            assert attributes(weight) == {"axis": 0, "block_size": BLOCK}
            scales = block_scales(graph, weight, compute)
            assert list(scales.input) == [f"{name}.scale", f"{name}.global_scale"]
            steps, whole = (graph.initializers[n] for n in scales.input)
            assert (steps.data_type, list(steps.dims)) == (
                TensorProto.FLOAT8E4M3FN,
                [columns // BLOCK, rows],
            )
            assert (whole.data_type, list(whole.dims)) == (TensorProto.FLOAT, [])
            kinds = [stored[n].dtype for n in (name, steps.name, whole.name)]
            assert kinds == ["F4", "F8_E4M3", "F32"]

            assert attributes(x) == {"axis": -1, "block_size": BLOCK}
            quantizer = graph.producers[x.input[0]]
            assert attributes(quantizer) == {
                "axis": -1,
                "block_size": BLOCK,
                "scale_type": TensorProto.FLOAT8E4M3FN,
            }
            scales = block_scales(graph, x, compute)
            assert list(scales.input) == [quantizer.output[1], quantizer.input[1]]
            constant = graph.initializers[quantizer.input[1]]
            assert constant.data_type == TensorProto.FLOAT
            largest = np.float32(2 * ranges.inputs[linear] / 2688)
            assert numpy_helper.to_array(constant) == largest
            quantizers.add(quantizer.name)
        assert len(quantizers) == 1, group


def shape_of(checkpoint: Checkpoint, linear: str) -> tuple[int, ...]:
    return checkpoint.part("transformer").weights[f"{linear}.weight"].shape


def test_weights_come_back_and_one_input_means_one_scale(
    quantized: Quantized, opened: Checkpoint
) -> None:
    """Engines merge the products of linears that share all scalars."""
    graph = onnx.load(quantized("fp4", "bf16")).graph
    found = {t.name: numpy_helper.to_array(t).astype(np.float32) for t in graph.initializer}
    stored = opened.part("transformer").weights
    for group in groups():
        weights = {f"{n}.weight": stored[f"{n}.weight"] for n in group}
        exact = {n: tensor.read().reshape(tensor.shape) for n, tensor in weights.items()}
        whole = max(np.abs(weight).max() for weight in exact.values()) / np.float32(2688)
        for name, weight in exact.items():
            assert found[f"{name}.global_scale"] == whole
            wide = found[name] * found[f"{name}.scale"].repeat(BLOCK, 0) * whole
            blocks = np.abs(weight).reshape(len(weight), -1, BLOCK).max(2).repeat(BLOCK, 1)
            assert (np.abs(wide.T - weight) <= blocks / 6 * (1 + 1 / 16) * 1.001).all()


@pytest.mark.parametrize("compute", COMPUTE)
def test_graphs_are_read_back(quantized: Quantized, ranges: ActivationRanges, compute: str) -> None:
    """Weights as ONNX reads them, and inputs rounded by ml_dtypes, some of them past the end."""
    path = quantized("fp4", compute)
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    linears = read_linears(path)
    assert linears.keys() == LINEARS
    for name, linear in linears.items():
        numbers, scales, whole = (
            found[f"{name}.{part}"].astype(np.float32)
            for part in ("weight", "weight.scale", "weight.global_scale")
        )
        exact = numbers * (scales * whole).repeat(BLOCK, 0)
        assert (linear.dequantized().numpy() == exact).all(), name
        step = np.float32(2 * ranges.inputs[name] / 2688)
        x = np.random.RandomState(7).standard_normal((8, 2 * BLOCK)).astype(np.float32)
        x *= ranges.inputs[name] * np.logspace(-6, 0.5, 8, dtype=np.float32)[:, None]
        blocks = x.reshape(8, 2, BLOCK)
        peaks = np.abs(blocks).max(2, keepdims=True) / 6 / step
        steps = np.clip(peaks, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn)
        steps = steps.astype(np.float32) * step
        narrow = np.clip(blocks / steps, -6, 6).astype(ml_dtypes.float4_e2m1fn)
        expected = (narrow.astype(np.float32) * steps).reshape(x.shape)
        assert np.abs(expected).max() == pytest.approx(2 * ranges.inputs[name], rel=1e-6)
        assert (linear.narrow(torch.from_numpy(x)).numpy() == expected).all(), name


def test_another_width_is_refused_in_words(
    export_into: ExportInto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporters.formats.nvfp4._BLOCK", 1000)
    refusal = r"takes \d+ numbers and gives \d+; FP4 needs multiples of 1000 and 2\. Use fp8"
    with pytest.raises(ExportError, match=refusal):
        export_into(tmp_path, "fp4", "bf16")
