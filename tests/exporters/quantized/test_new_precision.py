"""A precision is one row and a format one object: nothing else has to know of a new one."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from exporters.calibrate.ranges import ActivationRanges
from exporters.calibrate.trajectory import Sample, start_samples
from exporters.check.fidelity import measure_fidelity
from exporters.check.readback import read_attentions, read_linears
from exporters.checkpoint import Checkpoint
from exporters.formats import FORMATS, EightBits
from exporters.formats.row_scales import RowScaled
from fluxdeploy.bundle.recipe import Recipe
from fluxdeploy.bundle.tensorfile import read_header
from fluxdeploy.errors import ExportError, NumericError
from fluxdeploy.precision import PRECISIONS, Precision, Quantization
from fluxdeploy.progress import Progress
from tests.exporters.quantized.conftest import ATTENTIONS, LINEARS, SHORT, ExportInto
from tests.exporters.quantized.test_emulation import distance, ends, run
from tests.exporters.quantized.test_fidelity import scale_attention
from tests.exporters.quantized.test_quantized_graphs import Graph

QUIET = Progress(quiet=True)
END = 57344
"""The largest number of E5M2."""


def to_e5m2(x: Tensor, scale: Tensor | float) -> Tensor:
    """By ml_dtypes, with what is past the ends cut off."""
    quotients = (x / scale).clamp(-END, END).numpy().astype(ml_dtypes.float8_e5m2)
    return torch.from_numpy(quotients.astype(np.float32)) * scale


def add_precision(
    monkeypatch: pytest.MonkeyPatch, name: str, quantization: Quantization
) -> Precision:
    row = Precision(name, 0.5, 0.9, 15.0, 0.5, 10.0, quantization)
    monkeypatch.setitem(PRECISIONS, name, row)
    return row


@pytest.fixture
def e5m2(monkeypatch: pytest.MonkeyPatch) -> str:
    """A format of E5M2 numbers, which the product has not."""
    numbers = EightBits(
        stored="F8_E5M2",
        onnx_type=ir.DataType.FLOAT8E5M2,
        torch_type=torch.float8_e5m2,
        largest=END,
        headroom=3.0,
        rounded=functools.partial(to_e5m2, scale=1.0),
    )
    added = RowScaled("e5m2", numbers, activations=(None, "static"), attention=numbers)
    monkeypatch.setitem(FORMATS, added.name, added)
    return added.name


@pytest.fixture(scope="module")
def sample(opened: Checkpoint) -> Sample:
    return start_samples(opened, SHORT, QUIET)[1]


def stored_weight(checkpoint: Checkpoint, linear: str) -> Tensor:
    stored = checkpoint.part("transformer").weights[f"{linear}.weight"]
    return torch.from_numpy(stored.read().reshape(stored.shape))


def test_a_precision_over_a_known_format_is_a_row(
    export_into: ExportInto, opened: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INT8 linears as in `int8`, and attention in INT8, which no precision has."""
    add_precision(monkeypatch, "int8-all", Quantization("int8", "static", attention=True))
    path = export_into(tmp_path, "int8-all")
    (file,) = (tmp_path / "weights").iterdir()
    assert file.name == "transformer.int8-all.safetensors"
    linears, attentions = read_linears(path), read_attentions(path)
    assert linears.keys() == LINEARS
    assert attentions.keys() == ATTENTIONS
    for linear in LINEARS:
        weight = stored_weight(opened, linear)
        error = (linears[linear].dequantized().T - weight).abs()
        assert (error <= 0.501 * weight.abs().amax(1, keepdim=True) / 127).all()
    for scales in attentions.values():
        assert scales.numbers.stored == "I8"
        assert scales.softmax == np.float32(1 / 127)
    ratios = measure_fidelity(opened, path, Recipe(), SHORT, QUIET)
    assert len(ratios) == len(LINEARS) + 4 * len(ATTENTIONS)
    assert all(15 < ratio < 60 for ratio in ratios.values())


def test_a_new_format_is_exported(
    export_into: ExportInto,
    opened: Checkpoint,
    ranges: ActivationRanges,
    sample: Sample,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    e5m2: str,
) -> None:
    """ONNX Runtime computes what the same rounding, written out here, gives."""
    add_precision(monkeypatch, "e5m2-linears", Quantization(e5m2, "static"))
    path = export_into(tmp_path, "e5m2-linears")
    (file,) = (tmp_path / "weights").iterdir()
    entries = read_header(file).tensors
    assert {n for n, e in entries.items() if e.dtype == "F8_E5M2"} == {
        f"{linear}.weight" for linear in LINEARS
    }
    graph = Graph(path)
    names = {linear: ends(graph, linear) for linear in LINEARS}
    values = run(path, sample.inputs(0), sorted({n for pair in names.values() for n in pair}))
    found = {name: torch.from_numpy(np.array(value)) for name, value in values.items()}
    for linear, (x, y) in names.items():
        weight = stored_weight(opened, linear)
        rounded = to_e5m2(weight, weight.abs().amax(1, keepdim=True) / END)
        inputs = to_e5m2(found[x], 3 * ranges.inputs[linear] / END)
        assert distance(found[y], found[x] @ weight.T) > 1e-2, linear
        assert distance(found[y], inputs @ rounded.T) < 1e-5, linear


def test_a_new_format_is_read_back_and_measured(
    export_into: ExportInto,
    opened: Checkpoint,
    ranges: ActivationRanges,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    e5m2: str,
) -> None:
    add_precision(monkeypatch, "e5m2", Quantization(e5m2, "static", attention=True))
    path = export_into(tmp_path, "e5m2", "bf16")
    linears, attentions = read_linears(path), read_attentions(path)
    assert linears.keys() == LINEARS
    for name, linear in linears.items():
        weight = stored_weight(opened, name)
        assert linear.fits(*weight.shape)
        # Two bits of fraction, and a scale in bfloat16.
        error = (linear.dequantized().T - weight).abs()
        assert (error <= weight.abs() * (1 / 8 + 1 / 100) + 1e-6).all()
        x = 4 * ranges.inputs[name] * torch.linspace(-1, 1, 64)
        # What is past the end, 3 times what was measured, is cut off.
        assert linear.narrow(x).max().item() == pytest.approx(3 * ranges.inputs[name], rel=0.01)
    for name, attention in attentions.items():
        assert attention.numbers.onnx_type == ir.DataType.FLOAT8E5M2
        assert attention.value == pytest.approx(3 * ranges.values[name] / END, rel=0.01)
    assert attentions.keys() == ATTENTIONS
    ratios = measure_fidelity(opened, path, Recipe(), SHORT, QUIET)
    assert len(ratios) == len(LINEARS) + 4 * len(ATTENTIONS)
    # A bit less of fraction than E4M3 costs 6 dB.
    assert all(15 < ratio < 30 for ratio in ratios.values())
    # Its own end says how far a scale reaches.
    scale_attention(path, {("transformer_blocks.0.attn", "values"): 16})
    with pytest.raises(NumericError, match=r"blocks\.0\.attn\.value .* at most 16 times"):
        measure_fidelity(opened, path, Recipe(), SHORT, QUIET)
    # All that is known of it is known by that one entry.
    monkeypatch.delitem(FORMATS, e5m2)
    assert read_linears(path) == {}


def test_a_quantization_that_a_format_has_not_is_refused(
    export_into: ExportInto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for quantization, words in (
        (Quantization("fp8", "dynamic"), r"fp8 .* as dynamic; it has none, static"),
        (Quantization("nvfp4"), r"nvfp4 .* as none; it has static"),
    ):
        add_precision(monkeypatch, "impossible", quantization)
        with pytest.raises(ExportError, match=f"transformer: {words}"):
            export_into(tmp_path, "impossible")


def test_attention_in_two_types_is_refused(
    export_into: ExportInto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_precision(monkeypatch, "int8-all", Quantization("int8", "static", attention=True))
    path = export_into(tmp_path, "int8-all")
    graph = Graph(path)
    attention = "transformer_blocks.1.attn"
    quantizer = graph.quantizer(graph.attention(graph.softmaxes[attention])["keys"])
    assert quantizer is not None
    (kind,) = quantizer.attribute
    kind.i = TensorProto.FLOAT8E4M3FN
    path.write_bytes(graph.model.SerializeToString())
    with pytest.raises(ExportError, match=f"{attention} is not as expected"):
        read_attentions(path)


@pytest.mark.parametrize("scale_width", [2, 4])
def test_bytes_are_those_of_what_is_declared(scale_width: int) -> None:
    """Of 96 rows of 480 numbers: one or half a byte each, and a scale a row or a block."""
    rows, columns = 96, 480
    found = {name: known.nbytes((rows, columns), scale_width) for name, known in FORMATS.items()}
    eight = rows * columns + scale_width * rows
    assert found == {
        "fp8": eight,
        "int8": eight,
        "int4": rows * columns // 2 + scale_width * rows * columns // 32,
        "nvfp4": math.prod((rows, columns)) * 9 // 16 + 4,
    }
