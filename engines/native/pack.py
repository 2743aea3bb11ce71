"""Writing the file of a native engine: the graph's weights as its plan wants them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.native.file import ALIGNMENT, CUBIN, DTYPES, PADDING, PLAN
from engines.native.plan import Kind, Packed, Part, Plan
from fluxdeploy.bundle.tensorfile import (
    DTYPE_BITS,
    Declaration,
    TensorFileWriter,
    from_float32,
    to_float32,
)
from fluxdeploy.errors import EngineError
from fluxdeploy.native import native_errors
from fluxdeploy.progress import Progress

__all__ = ["declare", "write_engine"]

Array = NDArray[Any]

_CHUNK = 1 << 22
"""Numbers that are converted at a time."""

_COLUMNS = 128
"""Columns that are transposed at a time."""

_AGAIN = "Export it again."

_STORED: Mapping[ir.DataType, tuple[str, str]] = {
    ir.DataType.FLOAT: ("F32", "<f4"),
    ir.DataType.BFLOAT16: ("BF16", "<u2"),
    ir.DataType.FLOAT8E4M3FN: ("F8_E4M3", "u1"),
}
"""Types of a graph's weights, as safetensors and NumPy have them."""


def write_engine(
    path: str | os.PathLike[str],
    plan: Plan,
    model: ir.Model,
    cubins: Mapping[str, bytes],
    metadata: Mapping[str, str],
    progress: Progress,
) -> None:
    """Write an engine's file, which is there whole or not at all.

    `model` is what the plan was matched from; its external data is read a weight at a time.
    `metadata` must not have the key `plan`. Raises `EngineError` for weights that cannot be read,
    and `BundleError` where the disk refuses.
    """
    declared = declare(plan, cubins)
    sizes = [math.prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in declared]
    task = progress.task("  transformer: writing its engine", total=sum(sizes) or 1)
    with TensorFileWriter(path, declared, {**metadata, PLAN: plan.to_json()}) as writer:
        for pieces in (*(_packed(model, each) for each in plan.packed), *_codes(cubins)):
            size = 0
            for piece in pieces:
                writer.write(piece)
                size += piece.nbytes
                task.advance(piece.nbytes)
            writer.write(bytes(-size % ALIGNMENT))
            task.advance(-size % ALIGNMENT)
    task.finish()


def declare(plan: Plan, cubins: Mapping[str, bytes]) -> list[Declaration]:
    """The tensors of the file, with what fills the space up to the next one's place."""
    wanted: list[Declaration] = [(each.name, DTYPES[each.kind], each.shape) for each in plan.packed]
    wanted += [(f"{CUBIN}{name}", "U8", (len(code),)) for name, code in cubins.items()]
    declared = []
    for index, (name, dtype, shape) in enumerate(wanted):
        declared.append((name, dtype, shape))
        if missing := -(math.prod(shape) * DTYPE_BITS[dtype] // 8) % ALIGNMENT:
            declared.append((f"{PADDING}{index}", "U8", (missing,)))
    return declared


def _codes(cubins: Mapping[str, bytes]) -> Iterator[list[Array]]:
    for code in cubins.values():
        yield [np.frombuffer(code, np.uint8)]


def _packed(model: ir.Model, packed: Packed) -> Iterator[Array]:
    """The bytes of a packed tensor, as arrays."""
    for part in packed.parts:
        yield from _converted(model, part, packed.kind)


def _converted(model: ir.Model, part: Part, kind: Kind) -> Iterator[Array]:
    """A part's numbers in the packed tensor's type, some rows at a time."""
    values, dtype = _read(model, part.source)
    if part.transpose:
        values = values.T
    scale, columns = _vector(model, part.scale), _vector(model, part.columns)
    as_it_is = dtype == DTYPES[kind] and scale is columns is None and part.factor == 1
    step = max(1, _CHUNK // max(1, math.prod(values.shape[1:])))
    for start in range(0, len(values), step):
        some = _in_order(values[start : start + step])
        if as_it_is:
            yield some
            continue
        # A copy, also of what is in float32 already.
        wide = to_float32(some, dtype) * np.float32(part.factor)
        if scale is not None:
            wide *= scale[start : start + step, None]
        if columns is not None:
            wide *= columns
        yield from_float32(wide, DTYPES[kind])


def _in_order(values: Array) -> Array:
    """The same numbers, row after row."""
    if values.flags.c_contiguous:
        return values
    # Some columns at a time, which stay in the cache: four times as fast as all at once.
    made = np.empty(values.shape, values.dtype)
    for start in range(0, values.shape[1], _COLUMNS):
        made[:, start : start + _COLUMNS] = values[:, start : start + _COLUMNS]
    return made


def _vector(model: ir.Model, name: str | None) -> NDArray[np.float32] | None:
    return None if name is None else to_float32(*_read(model, name))


def _read(model: ir.Model, name: str) -> tuple[Array, str]:
    """An initializer's raw numbers, and their safetensors type."""
    tensor = model.graph.initializers[name].const_value
    if tensor is None or tensor.dtype not in _STORED:
        raise EngineError(f"The transformer's weight {name} holds no numbers that are read.")
    dtype, raw = _STORED[tensor.dtype]
    with native_errors(EngineError, f"The transformer's weight {name} cannot be read", _AGAIN):
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor.numpy().view(raw), dtype
        # Not mapped by `onnx_ir`, which refuses files that are linked from a checkpoint.
        count = math.prod(tensor.shape.numpy())
        values = np.fromfile(tensor.path, raw, count, offset=tensor.offset or 0)
        if values.size != count:
            raise ValueError(f"{tensor.path} is too short")
        return values.reshape(tensor.shape.numpy()), dtype
