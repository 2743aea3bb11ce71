"""Binding: the weights of a traced graph become external data in safetensors files.

A weight whose stored bytes are what the graph computes with stays where it is: the initializer
points into the checkpoint's file, hard-linked beside the graph. A wider type is reached by a Cast
in the graph, which is exact. Anything else is converted, streamed into a new safetensors file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporters.chain import Chain
from exporters.checkpoint.tensors import StoredTensor, Weights, find_tensor
from fluxdeploy.bundle.files import disk_errors, link_or_copy
from fluxdeploy.errors import CheckpointError, ExportError
from fluxdeploy.tensorfile import TensorFileWriter, from_float32, read_header

__all__ = ["WeightFolder", "bind", "check_weights"]

_STORED = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}
_NAMES = {dtype: name for name, dtype in _STORED.items()}
_CHUNK = 1 << 24
"""Elements converted at a time: 64 MB in float32, whatever the size of a tensor."""

OnBytes = Callable[[int], None]


def _ignore(_: int) -> None:
    pass


@dataclass
class WeightFolder:
    """The `weights` folder beside the graphs, and what was put there."""

    root: Path

    def __post_init__(self) -> None:
        self._links: dict[Path, str] = {}
        self._converted: set[str] = set()

    def link(self, file: Path, on_bytes: OnBytes = _ignore) -> str:
        """Make a checkpoint's file available below the folder; returns its name there."""
        source = Path(os.path.realpath(file))
        if source not in self._links:
            name = f"{file.parent.name}.{file.name}" if _is_part_folder(file.parent) else file.name
            if name in self._links.values() or name in self._converted:
                raise ExportError(f"Two weight files are both called {name}: rename one of them.")
            link_or_copy(source, self.root / name, on_bytes=on_bytes)
            self._links[source] = name
        return self._links[source]

    def linked_bytes(self, tensors: Iterable[tuple[ir.Value, StoredTensor]]) -> int:
        """The size of the files that `link` has yet to make available for these tensors."""
        sources = {Path(os.path.realpath(stored.file)) for _, stored in tensors}
        return sum(source.stat().st_size for source in sources - self._links.keys())

    def reserve(self, name: str) -> None:
        """Make room for a file of converted weights, which must not replace a linked one."""
        if name in self._links.values():
            raise ExportError(
                f"The converted weights are to be called {name}, as a file of the checkpoint is: "
                "rename that file."
            )
        self._converted.add(name)
        self.make()

    def make(self) -> None:
        """Make the folder. Raises `BundleError` where it cannot be."""
        with disk_errors("write", self.root):
            self.root.mkdir(parents=True, exist_ok=True)

    @property
    def sources(self) -> dict[str, Path]:
        """Linked names and the checkpoint's files they stand for."""
        return {name: source for source, name in self._links.items()}


def _is_part_folder(folder: Path) -> bool:
    return folder.name in ("transformer", "vae", "text_encoder", "text_encoder_2")


def bind(
    model: ir.Model,
    boundary: int,
    weights: Weights,
    folder: WeightFolder,
    converted: str,
    expect: Callable[[int], OnBytes] = lambda _: _ignore,
) -> list[str]:
    """Turn the model's inputs after the first `boundary` into initializers with external data.

    `converted` names the file below the folder for tensors whose bytes have to change. `expect` is
    told the bytes that are to be linked, copied or converted, if any, and returns what hears of
    each of them. Returns the names of the weight files that the graph needs.

    Raises `CheckpointError` for a missing tensor, a wrong shape, or a value that the graph's type
    cannot hold.
    """
    graph = model.graph
    parameters = list(graph.inputs[boundary:])
    del graph.inputs[boundary:]
    # Casts come in between, which leaves the order of these nodes as it is.
    order = {node: place for place, node in enumerate(graph)}
    kept: list[tuple[ir.Value, StoredTensor]] = []
    conversions: list[tuple[ir.Value, StoredTensor]] = []
    for value in parameters:
        assert value.shape is not None
        stored = find_tensor(weights, str(value.name), value.shape.numpy())
        exact = value.dtype in (_STORED.get(stored.dtype), ir.DataType.FLOAT)
        as_it_is = stored.dtype in _STORED and exact and stored.scale is None
        (kept if as_it_is else conversions).append((value, stored))
    total = folder.linked_bytes(kept) + _converted_bytes(conversions)
    on_bytes = expect(total) if total else _ignore
    files: dict[str, None] = {}
    for value, stored in kept:
        name = folder.link(stored.file, on_bytes)
        files[name] = None
        dtype = _STORED[stored.dtype]
        if dtype != value.dtype:
            _widen(graph, value, dtype, order)
        _point(graph, value, folder, name, stored.offset, stored.nbytes)
    if conversions:
        folder.reserve(converted)
        files[converted] = None
        _convert(conversions, folder.root / converted, on_bytes)
        entries = read_header(folder.root / converted).tensors
        for value, _ in conversions:
            entry = entries[str(value.name)]
            _point(graph, value, folder, converted, entry.offset, entry.nbytes)
    return list(files)


def _converted_bytes(conversions: Iterable[tuple[ir.Value, StoredTensor]]) -> int:
    total = 0
    for value, stored in conversions:
        assert value.dtype is not None
        total += math.prod(stored.shape) * value.dtype.bitwidth // 8
    return total


def check_weights(chain: Chain, weights: Weights) -> None:
    """Hold a checkpoint against a chain, before the work of tracing it.

    Raises `CheckpointError` for a missing tensor and for a wrong shape or type.
    """
    for stage in chain.stages:
        for name, parameter in stage.piece.module.named_parameters():
            find_tensor(weights, stage.scope + name, tuple(parameter.shape))


def _point(
    graph: ir.Graph, value: ir.Value, folder: WeightFolder, file: str, offset: int, nbytes: int
) -> None:
    assert value.dtype is not None
    assert value.shape is not None
    value.const_value = ir.ExternalTensor(
        location=f"{folder.root.name}/{file}",
        offset=offset,
        length=nbytes,
        dtype=value.dtype,
        shape=value.shape,
        name=str(value.name),
        base_dir=folder.root.parent,
    )
    graph.register_initializer(value)


def _widen(
    graph: ir.Graph, value: ir.Value, stored: ir.DataType, order: dict[ir.Node, int]
) -> None:
    """Let `value` hold the stored type and widen it where it is used.

    An embedding is widened after its rows are picked, not as a whole table.
    """
    uses = list(value.uses())
    needed = value.dtype
    assert needed is not None
    # A new type, since repeated blocks share theirs.
    value.type = ir.TensorType(stored)
    if all(node.op_type == "Gather" and index == 0 for node, index in uses):
        for node, _ in uses:
            cast = _insert_cast(node.outputs[0], needed)
            node.outputs[0].type = ir.TensorType(stored)
            graph.insert_after(node, cast)
    else:
        cast = _insert_cast(value, needed)
        graph.insert_before(min((node for node, _ in uses), key=order.__getitem__), cast)


def _insert_cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    """A Cast of `value`, its result given to all of the value's present users."""
    users = list(value.uses())
    cast = ir.Node(
        "",
        "Cast",
        inputs=[value],
        attributes=[ir.AttrInt64("to", to.value)],
        outputs=[ir.Value(name=f"{value.name}.{to.name.lower()}", type=ir.TensorType(to))],
        name=f"{value.name}/Cast",
    )
    for node, index in users:
        node.replace_input_with(index, cast.outputs[0])
    return cast


def _convert(
    conversions: list[tuple[ir.Value, StoredTensor]], path: Path, on_bytes: OnBytes
) -> None:
    """Stream tensors into a new file in the types that the graph asks for."""
    declared = []
    for value, stored in conversions:
        assert value.dtype is not None
        declared.append((str(value.name), _NAMES[value.dtype], stored.shape))
    with TensorFileWriter(path, declared) as writer:
        for (_, dtype, _), (_, stored) in zip(declared, conversions, strict=True):
            count = math.prod(stored.shape)
            for start in range(0, count, _CHUNK):
                values = stored.read(start, min(start + _CHUNK, count))
                narrow = from_float32(values, dtype)
                if dtype == "F16" and np.isinf(narrow).any() and np.isfinite(values).all():
                    raise CheckpointError(
                        f"Tensor {stored.name} holds values up to {np.abs(values).max():.3g}, "
                        "past FP16's 65504: build with --precision bf16."
                    )
                writer.write(narrow)
                on_bytes(narrow.nbytes)
