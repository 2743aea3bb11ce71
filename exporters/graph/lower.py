"""A module as ONNX by torch's exporter, without what that does in vain.

- torch traces a program a second and a third time to decompose what has no translation to ONNX and
  to take out changes in place. It finds next to nothing: the few operators of that kind are
  exchanged here, node by node, and what cannot be is left to torch.
- It remembers what operators do to shapes, which with symbols for sizes costs more than it saves.
- It reads all its translations anew for every program, for most of a second.

The last two are inner matters of torch, and are left as they are where it has nothing of that name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo.config
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.onnx import OnnxExporterError, ONNXProgram

__all__ = ["to_onnx"]

_aten = torch.ops.aten


def to_onnx(
    module: nn.Module, arguments: tuple[Any, ...], dynamic: tuple[Any, ...], opset: int
) -> ONNXProgram:
    """The module as an ONNX model, not optimized.

    `arguments` are examples of what it takes, and `dynamic` says which of their axes have any size.
    """
    with _replaced(torch._dynamo.config, "fake_tensor_cache_enabled", False):
        program = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
    if _lower(program):
        decompose = program.run_decompositions
        program.run_decompositions = lambda table=None: program
        try:
            return _convert(program, opset)
        except OnnxExporterError:  # an operator that has no translation
            program.run_decompositions = decompose
    return _convert(program, opset)


def _convert(program: ExportedProgram, opset: int) -> ONNXProgram:
    with _replaced(_registry(), "from_torchlib", staticmethod(_translations)):
        converted = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verify=False,
            verbose=False,
            opset_version=opset,
        )
    assert converted is not None
    return converted


def _registry() -> Any:
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return None
    return ONNXRegistry


_read_translations = getattr(_registry(), "from_torchlib", None)


@functools.cache
def _translations(**settings: Any) -> Any:
    assert _read_translations is not None
    return _read_translations(**settings)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """An attribute of torch's, if it is there, for a while."""
    before = getattr(owner, name, None)
    if before is None:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _lower(program: ExportedProgram) -> bool:
    """Exchange operators that have no translation; whether none is left that changes a value."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in nodes:
        exchange = _EXCHANGES.get(node.target)
        if exchange is not None:
            exchange(node)
    program.graph_module.recompile()
    schemas = (getattr(node.target, "_schema", None) for node in nodes)
    return not any(schema is not None and schema.is_mutable for schema in schemas)


def _to(node: Node) -> None:
    value, dtype = node.args[:2]
    assert isinstance(value, Node)
    node.args, node.kwargs = (value,), {}
    if value.meta["val"].dtype == dtype:
        node.target = _aten.alias.default
    else:
        node.target, node.kwargs = _aten._to_copy.default, {"dtype": dtype}


def _square(node: Node) -> None:
    node.target, node.args = _aten.pow.Tensor_Scalar, (*node.args, 2)


def _min(node: Node) -> None:
    node.target = _aten.minimum.default


def _add_in_place(node: Node) -> None:
    """`a += b`, where `a` was just made and nothing else sees it."""
    changed = node.args[0]
    if isinstance(changed, Node) and changed.target in _FRESH and len(changed.users) == 1:
        node.target = _aten.add.Tensor


_FRESH = (_aten.add.Tensor, _aten.mul.Tensor)

# A node keeps its name, by which the program knows its outputs, and the description of its value.
_EXCHANGES: dict[object, Callable[[Node], None]] = {
    _aten.to.dtype: _to,
    _aten.square.default: _square,
    _aten.min.other: _min,
    _aten.add_.Tensor: _add_in_place,
}
