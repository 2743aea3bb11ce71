"""An exported ONNX file, as formats read it back: nodes, scales, and values beside the graph."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from fluxdeploy.errors import ExportError

__all__ = ["GraphFile", "read_values", "values_of"]


class GraphFile:
    """An ONNX file's nodes by what they write and read. Weights beside it are not read.

    Raises `ExportError` for a file that is no ONNX graph.
    """

    def __init__(self, path: Path) -> None:
        try:
            graph = onnx.load(path, load_external_data=False).graph
        except Exception as error:  # protobuf's own classes, which differ between its versions
            raise ExportError(f"{path} cannot be read as an ONNX file: {error}.") from error
        self.folder = path.parent
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

    def narrowed(self, value: str) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
        """The QuantizeLinear and DequantizeLinear that a value comes through, None if not."""
        wide = self.producers.get(value)
        narrow = None if wide is None else self.producers.get(wide.input[0])
        if wide is None or narrow is None or wide.op_type != "DequantizeLinear":
            return None
        return narrow, wide


def read_values(tensor: TensorProto, folder: Path) -> Tensor:
    """The values of an initializer in float32, from the graph or from a file below `folder`.

    Raises `ExportError` where that file is missing or too short.
    """
    if tensor.data_location == TensorProto.EXTERNAL:
        raw = _raw_bytes(tensor, folder)
        return values_of(raw, ir.DataType(tensor.data_type), tuple(tensor.dims))
    return _wide(tensor)


def values_of(raw: NDArray[np.uint8], dtype: ir.DataType, shape: tuple[int, ...]) -> Tensor:
    """The values of raw bytes in float32, as ONNX stores numbers of this type."""
    return _wide(onnx.helper.make_tensor("", dtype.value, shape, raw.tobytes(), raw=True))


def _wide(tensor: TensorProto) -> Tensor:
    return torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype(np.float32))


def _raw_bytes(tensor: TensorProto, folder: Path) -> NDArray[np.uint8]:
    place = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / place["location"]
    offset, length = int(place.get("offset", 0)), int(place["length"])
    try:
        raw = np.fromfile(file, np.uint8, length, offset=offset)
    except OSError as error:
        raise ExportError(
            f"{tensor.name} cannot be read from {file}: {error.strerror or error}."
        ) from error
    expected = math.ceil(ir.DataType(tensor.data_type).itemsize * math.prod(tensor.dims))
    if raw.size != length or length != expected:
        raise ExportError(f"{file} was cut off, or belongs to another graph: build it again.")
    return raw
