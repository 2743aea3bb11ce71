"""Small graphs in the place of a bundle's own, for tests of what a host does around them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from fluxdeploy.bundle.manifest import ComponentRecord, FileRecord, Manifest
from fluxdeploy.bundle.manifest_json import from_json, to_json

__all__ = ["changed_bundle", "make_graph", "weights", "with_graph"]


def make_graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str]],
    constants: Mapping[str, NDArray[Any]],
) -> onnx.ModelProto:
    """A model of float32 tensors of these names and shapes."""

    def infos(tensors: Mapping[str, Sequence[int | str]]) -> list[onnx.ValueInfoProto]:
        kind = onnx.TensorProto.FLOAT
        return [helper.make_tensor_value_info(name, kind, each) for name, each in tensors.items()]

    held = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "graph", infos(inputs), infos(outputs), held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def with_graph(
    root: Path, record: ComponentRecord, name: str, model: onnx.ModelProto
) -> ComponentRecord:
    """A component whose graph is this one, written into the bundle at `root`."""
    path = f"onnx/{name}.onnx"
    data = model.SerializeToString()
    (root / path).write_bytes(data)
    file = FileRecord(path, len(data), hashlib.sha256(data).hexdigest())
    engine = replace(record.engines[0], path=path)
    # What its golden tensors are of is the other graph.
    return replace(record, files=(*record.files, file), engines=(engine,), golden=None)


def changed_bundle(bundle: Path, root: Path, change: Callable[[Path, Manifest], Manifest]) -> Path:
    """A copy of a bundle at `root`, with the manifest that `change(root, manifest)` gives."""
    shutil.copytree(bundle, root, copy_function=os.link)
    path = root / "fluxdeploy.json"
    manifest = from_json(path.read_text(encoding="utf-8"), str(path))
    path.unlink()
    path.write_text(to_json(change(root, manifest)), encoding="utf-8")
    return root


def weights(seed: int, *shape: int) -> NDArray[np.float32]:
    """Random ones that keep the size of what they multiply."""
    values = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)
