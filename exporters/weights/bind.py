"""Binding: the weights of a traced graph become external data in safetensors files.

`exporters.weights.decide` has said what becomes of each. Here the checkpoint's files are linked
beside the graph, all that changes is streamed into new safetensors files, and the graph's
initializers point into both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from exporters.checkpoint.tensors import StoredTensor
from exporters.formats import Packed
from exporters.weights.decide import Placement, Storing
from exporters.weights.write import Group, WrittenTensor, shards, write_files
from fluxdeploy.bundle.files import disk_errors, link_or_copy
from fluxdeploy.bundle.tensorfile import read_header
from fluxdeploy.errors import ExportError

__all__ = ["NO_LEDGER", "Ledger", "WeightFolder", "bind"]

_STORED = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}
OnBytes = Callable[[int], None]


def _ignore(_: int) -> None:
    pass


@dataclass
class WeightFolder:
    """The `weights` folder beside the graphs, and what was put there.

    put: makes a checkpoint's file available at a path, as `link_or_copy` and `clone` do.
    owners: by their real paths, files whose names here begin with a part's: those of ControlNets
        and other parts that joined, whose folders may have any name and whose files all have one.
    """

    root: Path
    put: Callable[[Path, Path, OnBytes], object] = link_or_copy
    owners: Mapping[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._links: dict[Path, str] = {}
        self._converted: set[str] = set()

    def link(self, file: Path, on_bytes: OnBytes = _ignore) -> str:
        """Make a checkpoint's file available below the folder; returns its name there."""
        source = Path(os.path.realpath(file))
        if source not in self._links:
            own = file.parent.name if _is_part_folder(file.parent) else None
            owner = self.owners.get(source, own)
            name = file.name if owner is None else f"{owner}.{file.name}"
            if name in self._links.values() or name in self._converted:
                raise ExportError(f"Two weight files are both called {name}: rename one of them.")
            self.put(source, self.root / name, on_bytes)
            self._links[source] = name
        return self._links[source]

    def linked_bytes(self, tensors: Iterable[StoredTensor]) -> int:
        """The size of the files that `link` has yet to make available for these tensors."""
        sources = {Path(os.path.realpath(stored.file)) for stored in tensors}
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


class Ledger(Protocol):
    """Remembers the files of converted weights that are whole, for a build that was stopped."""

    def finished(self, file: str) -> bool:
        """Whether an earlier run made this file of the weight folder from the same input."""

    def record(self, file: str, sha256: str) -> None:
        """A file is whole; `sha256` are 64 hex digits."""

    def stored_as(self, file: str) -> str:
        """What a file that is finished or recorded is called in the weight folder."""


class _NoLedger:
    def finished(self, file: str) -> bool:
        return False

    def record(self, file: str, sha256: str) -> None:
        pass

    def stored_as(self, file: str) -> str:
        return file


NO_LEDGER: Ledger = _NoLedger()


def bind(
    model: ir.Model,
    boundary: int,
    placements: Sequence[Placement],
    folder: WeightFolder,
    stem: str,
    packed: Mapping[str, Packed],
    expect: Callable[[int], OnBytes] = lambda _: _ignore,
    ledger: Ledger = NO_LEDGER,
) -> list[str]:
    """Turn the model's inputs after the first `boundary` into initializers with external data.

    `stem` names the files below the folder for tensors whose bytes have to change, without their
    suffix. `packed` are the weights that the graph has quantized. `expect` is told the bytes that
    are to be linked, copied or converted, if any, and returns what hears of each of them. Returns
    the names of the weight files that the graph needs.

    Raises `CheckpointError` for a value that the graph's type cannot hold.
    """
    graph = model.graph
    parameters = {str(value.name): value for value in graph.inputs[boundary:]}
    del graph.inputs[boundary:]
    # Casts come in between, which leaves the order of these nodes as it is.
    order = {node: place for place, node in enumerate(graph)}
    placed = {placement.name: placement for placement in placements}
    # In the order of the graph's parameters, whose scales stand after all weights.
    ordered = [placed[name] for name in parameters if name in placed]
    for placement in ordered:
        stored = _STORED[placement.dtype]
        if placement.how is not Storing.QUANTIZED and parameters[placement.name].dtype != stored:
            _widen(graph, parameters[placement.name], stored, order)
    linked = [placement for placement in ordered if placement.how is Storing.LINKED]
    written = _written(ordered, packed)
    total = folder.linked_bytes(p.stored for p in linked) + sum(t.nbytes for t in written)
    on_bytes = expect(total) if total else _ignore
    files: dict[str, None] = {}
    for placement in linked:
        stored_tensor = placement.stored
        file = folder.link(stored_tensor.file, on_bytes)
        files[file] = None
        value = parameters[placement.name]
        _point(graph, value, folder, file, stored_tensor.offset, stored_tensor.nbytes)
    parts = dict(shards(stem, written))
    missing = {}
    for file, tensors in parts.items():
        folder.reserve(file)
        if ledger.finished(file):
            on_bytes(sum(tensor.nbytes for tensor in tensors))
        else:
            missing[file] = tensors
    write_files(folder.root, missing, on_bytes, ledger.record)
    for file in map(ledger.stored_as, parts):
        files[file] = None
        for name, entry in read_header(folder.root / file).tensors.items():
            _point(graph, parameters[name], folder, file, entry.offset, entry.nbytes)
    return list(files)


def _written(placements: Sequence[Placement], packed: Mapping[str, Packed]) -> list[WrittenTensor]:
    """The tensors of the new files. Weights of a group share what is looked at for its scale."""
    written = []
    groups: dict[str, Group] = {}
    biases = {p.name: p for p in placements if p.how is Storing.CORRECTED}
    for placement in placements:
        name, stored = placement.name, placement.stored
        if placement.how in (Storing.LINKED, Storing.CORRECTED):
            continue
        if placement.how is not Storing.QUANTIZED:
            written.append(WrittenTensor(name, stored, placement.dtype))
            continue
        how = packed[name]
        group = groups.setdefault(how.group, Group()) if how.group else None
        if group is not None:
            group.members.append(stored)
        corrected = biases.get(name.removesuffix(".weight") + ".bias")
        bias = None
        if corrected is not None:
            bias = WrittenTensor(corrected.name, corrected.stored, corrected.dtype)
        written.append(WrittenTensor(name, stored, how.dtype, how, group, bias))
    return written


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
