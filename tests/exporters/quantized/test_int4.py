"""INT4 weights: their bytes as ONNX reads them, their scales, and the products they are in."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
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

from engines import BuildSettings, EngineSource, runtimes
from engines.base import EngineOptions
from engines.onnxruntime import _session
from engines.tensorrt.fusion import FusionReport
from exporters.calibrate.trajectory import start_samples
from exporters.check.readback import read_linears
from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS
from exporters.components.run import linear_modules, run_reference, run_samples
from exporters.export import export_component, specify
from exporters.formats import FORMATS, Packed
from exporters.weights.bind import WeightFolder
from fluxdeploy.bundle.manifest import DimensionRange
from fluxdeploy.errors import CheckpointError, ExportError
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress
from tests.exporters.quantized.conftest import (
    LINEARS,
    SHORT,
    ExportInto,
    Quantized,
    open_short,
)
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


@pytest.mark.parametrize("columns", [40, 12])
def test_a_last_block_has_zeros_up_to_its_end(columns: int) -> None:
    weight = random_weight(38, columns)
    longer = np.zeros((38, 64 if columns > BLOCK else BLOCK), np.float32)
    longer[:, :columns] = weight
    numbers, scales = (torch.from_numpy(part) for part in pack(longer))
    shape = (38, columns)
    codes = [*Packed(FORMATS["int4"], ir.DataType.FLOAT).pack([weight.copy()], shape, "", max)]
    width = longer.shape[1]
    assert [part.shape for part in codes] == [(width, 19), (width // BLOCK, 38 * 4)]
    assert not numbers[columns:].any()
    assert (torch.from_numpy(codes[0]) == torch.from_numpy(raw_codes(numbers.numpy()))).all()
    assert torch.equal(torch.from_numpy(codes[1].view(np.float32)), scales)
    found = FORMATS["int4"].emulate_weight(torch.from_numpy(weight), ir.DataType.FLOAT)
    assert found.shape == shape
    assert distance(found, to_int4(torch.from_numpy(weight))) < 1e-4


def raw_codes(numbers: Floats) -> NDArray[np.uint8]:
    """Two numbers a byte, the first in the low bits, of numbers [in, out]."""
    codes = numbers.astype(np.int8).view(np.uint8) & 15
    return np.asarray(codes[:, ::2] | codes[:, 1::2] << 4)


@pytest.mark.parametrize("columns", [40, 64])
def test_what_a_product_is_in_the_mean_is_that_of_all_its_blocks(columns: int) -> None:
    weight = random_weight(38, columns)
    mean = np.random.RandomState(2).standard_normal(columns).astype(np.float32)
    packed = Packed(FORMATS["int4"], ir.DataType.FLOAT, mean=mean)
    shape = (38, columns)
    parts = [*packed.pack([weight.copy()], shape, "", max)]
    rounded = FORMATS["int4"].emulate_weight(torch.from_numpy(weight), ir.DataType.FLOAT)
    assert np.allclose(packed.mean_product(parts, shape), rounded.numpy() @ mean, rtol=1e-4)


@pytest.fixture(scope="module")
def odd(checkpoint: Callable[..., Path]) -> Checkpoint:
    """Linears of 60 numbers, in padded blocks, and of 240 and 300."""
    return open_short(checkpoint("schnell"))


@pytest.fixture(scope="module")
def make_odd(odd: Checkpoint, tmp_path_factory: Any, remembered_traces: Path) -> Callable[..., Any]:
    @functools.cache
    def make(compute: str) -> Path:
        folder = tmp_path_factory.mktemp(f"odd-{compute}")
        spec = specify(odd, COMPONENTS["transformer"], "int4-weights", compute)
        exported = export_component(spec, WeightFolder(folder / "weights"))
        assert exported.quantized == len(read_linears(folder / exported.path))
        return Path(folder / exported.path)

    return make


@pytest.fixture
def given(odd: Checkpoint) -> dict[str, Any]:
    return start_samples(odd, SHORT, Progress(quiet=True))[1].inputs(0)


def test_odd_widths_are_quantized_too(make_odd: Callable[..., Path], odd: Checkpoint) -> None:
    for name, linear in read_linears(make_odd("bf16")).items():
        stored = odd.part("transformer").weights[f"{name}.weight"]
        rows, columns = stored.shape
        assert linear.fits(rows, columns)
        x = torch.randn(3, columns)
        exact = x @ torch.from_numpy(stored.read().reshape(stored.shape)).T
        assert distance(linear.narrow(x) @ linear.dequantized(), exact) < 0.15, name


def test_an_input_is_padded_once_for_all_that_read_it(make_odd: Callable[..., Path]) -> None:
    graph = Graph(make_odd("bf16"))
    pads = [node for node in graph.model.graph.node if node.op_type == "Pad"]
    assert len({node.input[0] for node in pads}) == len(pads)
    assert max(len(graph.users[node.output[0]]) for node in pads) >= 3, "q, k and v"


def expected_velocity(odd: Checkpoint, given: dict[str, Any]) -> Any:
    """With weights that are rounded in float64, and zeros nowhere."""
    chain, weights = COMPONENTS["transformer"].source(odd, "fp32")
    large = COMPONENTS["transformer"].is_quantized
    scope = ""

    def enter(stage: Any) -> None:
        nonlocal scope
        scope = stage.scope

    def product(name: str, linear: Any, inputs: Any, output: Any) -> Any:
        if large(scope + name):
            return inputs[0] @ to_int4(linear.weight).T + linear.bias
        return None

    for piece in chain.pieces:
        for name, module in linear_modules(piece).items():
            module.register_forward_hook(functools.partial(product, name))
    return run_samples(chain, weights, [given], enter)[0]["velocity"]


def test_padded_products_are_onnxruntimes(
    make_odd: Callable[..., Path], odd: Checkpoint, given: dict[str, Any]
) -> None:
    session = _session(
        make_odd("fp32"), "cpu", EngineOptions(threads=1), "transformer", "int4-weights"
    )
    (found,) = session.run(["velocity"], given)
    expected = expected_velocity(odd, given)
    exact = run_reference(*COMPONENTS["transformer"].source(odd, "fp32"), given)["velocity"]
    assert distance(expected, exact) > 0.02
    assert distance(found, expected) < 0.01


def test_padded_products_are_openvinos(
    make_odd: Callable[..., Path], odd: Checkpoint, given: dict[str, Any]
) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    from engines.openvino import _compile

    compiled = _compile(make_odd("fp32"), "fp32", EngineOptions(threads=1), "transformer")
    found = compiled(given)["velocity"]
    assert distance(found, expected_velocity(odd, given)) < 0.01


def test_tensorrt_rtx_builds_padded_products(odd: Checkpoint, tmp_path: Path) -> None:
    """Of the conditioner, since attention with heads of 20 is not to be had in 16 bits there."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    spec = specify(odd, COMPONENTS["conditioner"], "int4-weights", "bf16")
    exported = export_component(spec, WeightFolder(tmp_path / "weights"))
    path = tmp_path / exported.path
    assert exported.quantized
    assert any(node.op_type == "Pad" for node in onnx.load(path).graph.node)
    source = EngineSource(
        "conditioner",
        PRECISIONS["int4-weights"],
        "bf16",
        path,
        spec.chain.inputs,
        exported.quantized,
        exported.attentions,
        one_head=False,
        weight_bytes=exported.weight_bytes,
    )
    (runtime,) = runtimes("tensorrt-rtx")
    ranges = {name: DimensionRange(1, 2, 4) for name in ("B", "N", "S")}
    engine, kernels = runtime.build(
        source, ("sm89",), BuildSettings((ranges,)), tmp_path / "engine", Progress(quiet=True)
    )
    assert engine.stat().st_size
    gemms = FusionReport.from_json(kernels.read_text()).gemms
    assert gemms["int4-weights"] == exported.quantized


def test_another_width_is_refused_in_words(
    export_into: ExportInto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int4 = FORMATS["int4"]
    assert int4.problem(98, 320) is int4.problem(96, 79) is None
    assert "gives 97 numbers; INT4 needs a multiple of 2" in str(int4.problem(97, 320))
    monkeypatch.setattr(type(int4), "problem", lambda *_: "is refused. Use int8-weights.")
    with pytest.raises(ExportError, match=r"is refused\. Use int8-weights\."):
        export_into(tmp_path, "int4-weights", "bf16")


def test_the_search_is_the_one_written_out_in_float64() -> None:
    weight = torch.from_numpy(random_weight(38, 96))
    found = FORMATS["int4"].emulate_weight(weight, ir.DataType.FLOAT)
    assert distance(found, to_int4(weight)) < 1e-4
