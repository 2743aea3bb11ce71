"""How much of each quantized linear's output is left: its signal-to-quantization-noise ratio.

Everything is read back from the exported file, scales and bytes, and applied to what the float32
network feeds each linear: a wrong scale shows, whoever wrote it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from exporters.checkpoint import Checkpoint
from exporters.export import component_source
from exporters.quantize.graph import LARGEST
from exporters.quantize.ranges import linears
from exporters.quantize.trajectory import Calibration, start_samples, take_step
from exporters.reference import watch_linears
from fluxdeploy.errors import ExportError
from fluxdeploy.progress import Progress

__all__ = ["LIMIT", "QuantizedLinear", "measure_fidelity", "read_linears"]

LIMIT = 144.0
"""dB: the rounding of float32 itself. No ratio is further from 0, so that all of them are finite
numbers."""

_TORCH: Mapping[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear of an exported graph: weight [in, out] and scales [out].

    `input_scale` is the static scale of its input, None where it has none; `dynamic` says that the
    input's scale is computed every time. External data lies in `folder`.
    """

    weight: TensorProto
    scales: TensorProto
    input_scale: float | None
    dynamic: bool
    folder: Path

    def dequantized(self) -> Tensor:
        """The weight [in, out] that the graph multiplies with, float32, read from its file."""
        return _read(self.weight, self.folder) * _read(self.scales, self.folder)

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
        end = LARGEST["F8_E4M3"]
        narrow = (x / self.input_scale).clamp(-end, end).to(torch.float8_e4m3fn)
        return narrow.float() * self.input_scale


def measure_fidelity(
    checkpoint: Checkpoint, onnx_path: Path, calibration: Calibration, progress: Progress
) -> dict[str, float]:
    """The SQNR in dB of each quantized linear of an exported transformer, in order.

    10 log10 of the power of x Wᵀ over that of its error, where x is what the linear takes in the
    float32 network: over all samples of a calibration, at the step in the middle of its schedule.
    One stage of the network is in memory at a time.

    Raises `ExportError` for a graph that cannot be read, or in which other linears are quantized
    than the large ones of this checkpoint, and what `measure_ranges` raises.
    """
    chain, weights = component_source(checkpoint, "transformer", "fp32")
    found = read_linears(onnx_path)
    for name in sorted(found.keys() ^ set(linears(chain))):
        state = "is quantized, which must not be" if name in found else "is not quantized"
        raise ExportError(f"{onnx_path} does not fit this checkpoint: {name} {state}.")
    middle = calibration.steps // 2
    samples = start_samples(checkpoint, calibration, progress)
    task = progress.task("Measuring quantization noise", (middle + 1) * len(chain.stages))
    for step in range(middle):
        take_step(chain, weights, samples, step, after=task.advance)
    meter = _Meter(onnx_path, found)
    enter = watch_linears(chain, meter.see)
    take_step(chain, weights, samples, middle, enter, task.advance)
    return {name: _decibels(meter.signal[name], meter.noise[name]) for name in linears(chain)}


class _Meter:
    """Sums up the power of the linears' outputs and of their errors."""

    def __init__(self, path: Path, quantized: Mapping[str, QuantizedLinear]) -> None:
        self.signal: dict[str, float] = defaultdict(float)
        self.noise: dict[str, float] = defaultdict(float)
        self._path = path
        self._quantized = quantized

    def see(self, name: str, linear: nn.Linear, x: Tensor, output: Tensor) -> None:
        quantized = self._quantized.get(name)
        if quantized is None:
            return
        rows, columns = linear.weight.shape
        if [*quantized.weight.dims, *quantized.scales.dims] != [columns, rows, rows]:
            raise ExportError(
                f"{self._path} does not fit this checkpoint: {name} is not "
                f"{rows}x{columns} with a scale a row."
            )
        exact = output - linear.bias
        error = quantized.quantized_input(x) @ quantized.dequantized() - exact
        self.signal[name] += _power(exact)
        self.noise[name] += _power(error)


def _power(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return LIMIT
    if signal == 0 or not math.isfinite(noise):
        return -LIMIT
    return max(-LIMIT, min(LIMIT, 10 * math.log10(signal / noise)))


def read_linears(path: Path) -> dict[str, QuantizedLinear]:
    """The linears of an exported graph whose weights are in 8 bits, by name.

    Weights are read when asked for. Raises `ExportError` for a file that is no ONNX graph, and for
    quantized weights in another form than the exporter's.
    """
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own classes, which differ between its versions
        raise ExportError(f"{path} cannot be read as an ONNX file: {error}.") from error
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = {}
    for name, weight in initializers.items():
        if weight.data_type not in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN):
            continue
        try:
            (reader,) = users[name]
            dynamic = reader.op_type == "MatMulInteger"
            scales = initializers[f"{name}.scale" if dynamic else reader.input[1]]
            input_scale = None
            if not dynamic:
                (product,) = users[reader.output[0]]
                source = producers.get(product.input[0])
                if source is not None and source.op_type == "DequantizeLinear":
                    scale = onnx.numpy_helper.to_array(initializers[source.input[1]])
                    input_scale = float(scale)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ExportError(
                f"{path} was not written by this exporter: the use of {name} is not as expected."
            ) from error
        linear = name.removesuffix(".weight")
        found[linear] = QuantizedLinear(weight, scales, input_scale, dynamic, path.parent)
    return found


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
    dtype = _TORCH[tensor.data_type]
    if raw.size != length or length != dtype.itemsize * math.prod(tensor.dims):
        raise ExportError(f"{file} was cut off, or belongs to another graph: build it again.")
    return torch.from_numpy(raw).view(dtype).float().reshape(tuple(tensor.dims))
