"""What is quantized in an exported graph, read back from its file: scales and bytes.

Only what the graph says counts, so that a mistake of whoever wrote it is read as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from exporters.formats.nvfp4 import BLOCK
from exporters.graph.quantize import LARGEST
from exporters.weights.storage import SCALE_SUFFIX
from fluxdeploy.errors import ExportError

__all__ = ["QuantizedAttention", "QuantizedLinear", "read_attentions", "read_linears", "to_fp8"]

_TORCH: Mapping[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
}

_NARROW = (TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1)


def to_fp8(x: Tensor, scale: float) -> Tensor:
    """float32 values as E4M3 has them with a scale; those past its end are cut off there."""
    end = LARGEST["F8_E4M3"]
    return (x / scale).clamp(-end, end).to(torch.float8_e4m3fn).float() * scale


def to_fp4(x: Tensor, scale: float) -> Tensor:
    """float32 values as blocks of E2M1 along the last axis have them, over a scale for all."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    peaks = blocks.abs().amax(-1, keepdim=True) / 6 / scale
    steps = peaks.clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float() * scale
    quotients = (blocks / steps).clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn)
    return (torch.from_numpy(quotients.astype(np.float32)) * steps).reshape(x.shape)


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear of an exported graph: weight [in, out] and scales [out], in FP4 [in / 16, out].

    `input_scale` is the static scale of its input, None where it has none; `dynamic` says that the
    input's scale is computed every time. `global_scale` is the scale of FP4's scales. External
    data lies in `folder`.
    """

    weight: TensorProto
    scales: TensorProto
    input_scale: float | None
    dynamic: bool
    folder: Path
    global_scale: TensorProto | None = None

    def dequantized(self) -> Tensor:
        """The weight [in, out] that the graph multiplies with, float32, read from its file."""
        weight, scales = _read(self.weight, self.folder), _read(self.scales, self.folder)
        if self.global_scale is None:
            return weight * scales
        whole = _read(self.global_scale, self.folder)
        return weight * (scales * whole).repeat_interleave(BLOCK, 0)

    def quantized_input(self, x: Tensor) -> Tensor:
        """float32 inputs as the graph's product sees them."""
        if self.dynamic:
            low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
            step = (high - low) / 255 or 1.0
            zero = round(-low / step)
            return (((x / step).round() + zero).clamp(0, 255) - zero) * step
        if self.input_scale is None:
            return x
        if self.weight.data_type == TensorProto.INT8:
            return (x / self.input_scale).round().clamp(-128, 127) * self.input_scale
        if self.weight.data_type == TensorProto.FLOAT4E2M1:
            return to_fp4(x, self.input_scale)
        return to_fp8(x, self.input_scale)


@dataclass(frozen=True)
class QuantizedAttention:
    """The static scales of softmax(Q Kᵀ) V in an exported graph, where all of it is in E4M3."""

    query: float
    key: float
    softmax: float
    value: float


class _Graph:
    """An ONNX file's nodes by what they write and read. Weights beside it are not read."""

    def __init__(self, path: Path) -> None:
        try:
            graph = onnx.load(path, load_external_data=False).graph
        except Exception as error:  # protobuf's own classes, which differ between its versions
            raise ExportError(f"{path} cannot be read as an ONNX file: {error}.") from error
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)

    def scale(self, node: onnx.NodeProto) -> float:
        """The scale of a QuantizeLinear or DequantizeLinear of a whole tensor."""
        return float(onnx.numpy_helper.to_array(self.initializers[node.input[1]]))

    def blocks(self, wide: onnx.NodeProto) -> onnx.NodeProto:
        """The DequantizeLinear that makes the scales of one in blocks."""
        node: onnx.NodeProto = self.producers[wide.input[1]]
        return self.producers[node.input[0]] if node.op_type == "Cast" else node

    def narrowed(self, value: str) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
        """The QuantizeLinear and DequantizeLinear that a value comes through, None if not."""
        wide = self.producers.get(value)
        narrow = None if wide is None else self.producers.get(wide.input[0])
        if wide is None or narrow is None or wide.op_type != "DequantizeLinear":
            return None
        return narrow, wide


def read_linears(path: Path) -> dict[str, QuantizedLinear]:
    """The linears of an exported graph whose weights are in 8 bits, by name.

    Weights are read when asked for. Raises `ExportError` for a file that is no ONNX graph, and for
    quantized weights in another form than the exporter's.
    """
    graph = _Graph(path)
    found = {}
    for name, weight in graph.initializers.items():
        # The block scales of FP4 are in E4M3 too.
        if weight.data_type not in _NARROW or name.endswith(SCALE_SUFFIX):
            continue
        if weight.data_type == TensorProto.FLOAT4E2M1:
            found[name.removesuffix(".weight")] = _fp4_linear(graph, weight, path)
            continue
        try:
            (reader,) = graph.users[name]
            dynamic = reader.op_type == "MatMulInteger"
            scales = graph.initializers[f"{name}.scale" if dynamic else reader.input[1]]
            input_scale = None
            if not dynamic:
                (product,) = graph.users[reader.output[0]]
                source = graph.producers.get(product.input[0])
                if source is not None and source.op_type == "DequantizeLinear":
                    input_scale = graph.scale(source)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ExportError(
                f"{path} was not written by this exporter: the use of {name} is not as expected."
            ) from error
        linear = name.removesuffix(".weight")
        found[linear] = QuantizedLinear(weight, scales, input_scale, dynamic, path.parent)
    return found


def _fp4_linear(graph: _Graph, weight: TensorProto, path: Path) -> QuantizedLinear:
    try:
        (reader,) = graph.users[weight.name]
        (product,) = graph.users[reader.output[0]]
        steps, whole = (graph.initializers[n] for n in graph.blocks(reader).input)
        x = graph.producers[product.input[0]]
        input_scale = graph.scale(graph.blocks(x))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ExportError(
            f"{path} was not written by this exporter: the use of {weight.name} is not as expected."
        ) from error
    return QuantizedLinear(weight, steps, input_scale, False, path.parent, whole)


def read_attentions(path: Path) -> dict[str, QuantizedAttention]:
    """The quantized attentions of an exported transformer, "transformer_blocks.0.attn" and so on.

    Raises `ExportError` for a file that is no ONNX graph, and for attentions in another form than
    the exporter's: where a block has them in 8 bits, Q, K, V and softmax output of every block are.
    """
    graph = _Graph(path)
    scales: dict[str, list[float | None]] = {}
    for node in graph.nodes:
        if node.op_type != "Softmax":
            continue
        name = node.name.partition("/")[0].rpartition(".")[0] + ".attn"
        try:
            scales[name] = _attention_scales(graph, node)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ExportError(
                f"{path} was not written by this exporter: {name} is not as expected."
            ) from error
    if all(scale is None for found in scales.values() for scale in found):
        return {}
    attentions = {}
    for name, found in scales.items():
        whole = [scale for scale in found if scale is not None]
        if len(whole) < len(found):
            part = ("Q", "K", "the softmax output", "V")[found.index(None)]
            raise ExportError(
                f"{path} was not written by this exporter: {part} of {name} is not quantized, "
                "though attention is elsewhere."
            )
        attentions[name] = QuantizedAttention(*whole)
    return attentions


def _attention_scales(graph: _Graph, softmax: onnx.NodeProto) -> list[float | None]:
    """The scales of Q, K, softmax output and V; None for those that are not in 8 bits."""
    scores = graph.producers[softmax.input[0]]
    while scores.op_type == "Cast":
        scores = graph.producers[scores.input[0]]
    (mixed,) = graph.users[softmax.output[0]]
    while mixed.op_type in ("Cast", "QuantizeLinear", "DequantizeLinear"):
        (mixed,) = graph.users[mixed.output[0]]
    if scores.op_type != "MatMul" or mixed.op_type != "MatMul":
        raise ValueError
    scales: list[float | None] = []
    for value in (*scores.input, *mixed.input):
        nodes = graph.narrowed(value)
        if nodes is None:
            scales.append(None)
            continue
        narrow, wide = nodes
        types = [attribute.i for attribute in narrow.attribute if attribute.name == "output_dtype"]
        if narrow.input[1] != wide.input[1] or types != [TensorProto.FLOAT8E4M3FN]:
            raise ValueError
        scales.append(graph.scale(wide))
    return scales


def _read(tensor: TensorProto, folder: Path) -> Tensor:
    """The values of an initializer in float32, from the graph or from a file beside it.

    Raises `ExportError` where that file is missing or too short.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype(np.float32))
    place = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / place["location"]
    offset, length = int(place.get("offset", 0)), int(place["length"])
    try:
        raw = np.fromfile(file, np.uint8, length, offset=offset)
    except OSError as error:
        raise ExportError(
            f"{tensor.name} cannot be read from {file}: {error.strerror or error}."
        ) from error
    if tensor.data_type == TensorProto.FLOAT4E2M1:
        # Two numbers a byte, which ONNX itself knows to read.
        if 2 * raw.size != math.prod(tensor.dims):
            raise ExportError(f"{file} was cut off, or belongs to another graph: build it again.")
        whole = onnx.helper.make_tensor("", tensor.data_type, tensor.dims, raw.tobytes(), raw=True)
        return torch.from_numpy(onnx.numpy_helper.to_array(whole).astype(np.float32))
    dtype = _TORCH[tensor.data_type]
    if raw.size != length or length != dtype.itemsize * math.prod(tensor.dims):
        raise ExportError(f"{file} was cut off, or belongs to another graph: build it again.")
    return torch.from_numpy(raw).view(dtype).float().reshape(tuple(tensor.dims))
