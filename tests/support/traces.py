"""Tracing, which is nearly all the time of a small build or export, done once a test session.

Everything else of a build stays real. A trace is kept on the disk under what decides it, and comes
back as it was: builds with remembered traces have the bytes of real ones, which
tests/builds/test_build.py holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from exporters.components.chain import Chain, Piece
from exporters.graph.trace import trace_chain
from tests.support.shared_folder import SharedFolder

__all__ = ["Traces"]


class Traces:
    """Takes the place of `exporters.export.trace_chain`; `components` lists its calls."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.components: list[str] = []
        self._folder = SharedFolder(root)

    def __call__(self, chain: Chain) -> ir.Model:
        self.components.append(chain.component)

        def trace(folder: Path) -> None:
            folder.mkdir()
            model = trace_chain(chain)
            (folder / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())

        entry = self._folder.entry(f"{chain.component}-{digest(chain)}", trace)
        return ir.from_proto(onnx.load(entry / "model.onnx"))


def digest(chain: Chain) -> str:
    """Of all that decides a chain's graph, for chains of one version of the exporters."""
    pieces = [(piece.inputs, list(_described(piece))) for piece in chain.pieces]
    stages = [
        (chain.pieces.index(stage.piece), stage.reads, stage.writes, stage.scope)
        for stage in chain.stages
    ]
    decided = (chain.component, chain.inputs, chain.outputs, pieces, stages)
    return hashlib.sha256(repr(decided).encode()).hexdigest()[:16]


def _described(piece: Piece) -> Iterator[object]:
    """A piece's modules: their kinds, settings and tensors."""
    for name, module in piece.module.named_modules():
        settings = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        yield name, type(module).__qualname__, _plain(settings)
        for key, parameter in module.named_parameters(recurse=False):
            yield key, tuple(parameter.shape), parameter.dtype
        for key, buffer in module.named_buffers(recurse=False):
            yield key, tuple(buffer.shape), buffer.dtype, _values(buffer)


def _plain(value: Any) -> object:
    """A setting without the addresses that a `repr` may hold."""
    if isinstance(value, dict):
        return sorted((str(key), _plain(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, _values(value)
    if isinstance(value, (bool, int, float, str, torch.dtype, type(None))):
        return repr(value)
    return type(value).__qualname__, _plain(getattr(value, "__dict__", {}))


def _values(tensor: torch.Tensor) -> object:
    return None if tensor.is_meta else tensor.tolist()
