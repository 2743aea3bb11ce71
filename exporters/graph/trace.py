"""Tracing: a chain becomes one ONNX graph, each distinct piece traced once.

Parameters stay on the meta device and enter a traced piece as inputs, so that no optimization
tries to read or fold them. `exporters.weights.bind` turns them into external data.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn

from exporters.components.chain import Chain, Piece
from exporters.graph.lower import to_onnx
from exporters.graph.simplify import drop_round_trips, simplify_shapes
from fluxdeploy.bundle.manifest import TensorSpec
from fluxdeploy.errors import ExportError

__all__ = ["OPSET", "trace_chain"]

OPSET = 22
"""ONNX opset 22: the first whose Conv takes bfloat16, and in every current runtime."""

# Sizes to trace with: no two alike and none of them 1, since torch would take a size of 1 for a
# constant and equal sizes for the same symbol. T = S + L; H and W are whole VAE strides.
_EXAMPLE = {"B": 2, "S": 5, "L": 7, "T": 12, "V": 9, "N": 3}
_EXAMPLE |= {"h": 6, "w": 10, "H": 48, "W": 80}

_DTYPES = {"float32": ir.DataType.FLOAT, "int32": ir.DataType.INT32}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says of packages and types that do not matter here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@dataclass(frozen=True)
class _Traced:
    """A traced piece, a part of its chain's trace: nodes from its inputs to its outputs.

    `parameters` are values named as in the piece's module; all other values that the nodes read
    are `inputs`, constants, or made by nodes before them.
    """

    inputs: tuple[ir.Value, ...]
    parameters: Mapping[str, ir.Value]
    nodes: tuple[ir.Node, ...]
    outputs: tuple[ir.Value, ...]


class _SideBySide(nn.Module):
    """Independent modules as one: torch's exporter takes a second to start, whatever its work."""

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(piece.module for piece in pieces)

    def forward(self, arguments: tuple[tuple[Tensor, ...], ...]) -> tuple[tuple[Tensor, ...], ...]:
        results = (piece(*inputs) for piece, inputs in zip(self.pieces, arguments, strict=True))
        return tuple(r if isinstance(r, tuple) else (r,) for r in results)


def _trace_pieces(chain: Chain) -> dict[Piece, _Traced]:
    """Trace a chain's pieces in one go and cut the graph into theirs."""
    pieces = chain.pieces
    arguments = tuple(
        tuple(
            torch.empty(value.size(_EXAMPLE), dtype=value.dtype, device="meta")
            for value in piece.inputs
        )
        for piece in pieces
    )
    dynamic = tuple(
        tuple(
            {axis: torch.export.Dim.DYNAMIC for axis, d in enumerate(v.shape) if isinstance(d, str)}
            for v in piece.inputs
        )
        for piece in pieces
    )
    try:
        with _quiet(), torch.device("meta"), torch.no_grad():
            program = to_onnx(_SideBySide(pieces), (arguments,), (dynamic,), OPSET)
    except Exception as error:
        raise ExportError(f"{chain.component} could not be traced to ONNX: {error}") from error
    graph = program.model.graph
    inputs = iter(list(graph.inputs))
    parameters = [_take_parameters(graph, number, piece) for number, piece in enumerate(pieces)]
    with _quiet():
        optimize_ir(program.model)
        simplify_shapes(program.model)
        CommonSubexpressionEliminationPass()(program.model)
        IdentityEliminationPass()(program.model)
        RemoveUnusedNodesPass()(program.model)
    # Passes may put another value in an output's place, but keep the order.
    outputs = iter(graph.outputs)
    writes = {stage.piece: len(stage.writes) for stage in chain.stages}
    traced = {}
    for piece, named in zip(pieces, parameters, strict=True):
        ends = tuple(itertools.islice(outputs, writes[piece]))
        traced[piece] = _Traced(
            inputs=tuple(itertools.islice(inputs, len(piece.inputs))),
            parameters=named,
            nodes=_nodes_up_to(graph, ends),
            outputs=ends,
        )
    return traced


def _take_parameters(graph: ir.Graph, number: int, piece: Piece) -> dict[str, ir.Value]:
    """Make a piece's parameters inputs of the graph; returns them by their names in the piece."""
    parameters = {}
    for name, _ in piece.module.named_parameters():
        value = graph.initializers.pop(f"pieces.{number}.{name}", None)
        if value is None:
            kind = type(piece.module).__name__
            raise ExportError(f"Parameter {name} of {kind} is not used by its own graph.")
        value.const_value = None
        graph.inputs.append(value)
        parameters[name] = value
    return parameters


def _nodes_up_to(graph: ir.Graph, outputs: tuple[ir.Value, ...]) -> tuple[ir.Node, ...]:
    """The nodes that some values depend on, in the order of the graph."""
    needed: set[ir.Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop().producer()
        if node is not None and node not in needed:
            needed.add(node)
            pending.extend(value for value in node.inputs if value is not None)
    return tuple(node for node in graph if node in needed)


def trace_chain(chain: Chain) -> ir.Model:
    """The chain as one ONNX model whose weights are inputs named as in the checkpoint.

    The first inputs are the chain's own. Raises `ExportError` where torch cannot trace a piece or
    a stage does not fit the next.
    """
    values = {spec.name: _boundary(spec) for spec in chain.inputs}
    parameters: dict[str, ir.Value] = {}
    constants: dict[tuple[object, ...], ir.Value] = {}
    nodes: list[ir.Node] = []
    pieces = _trace_pieces(chain)
    for stage in chain.stages:
        traced = pieces[stage.piece]
        mapping = {
            inner: values[name] for inner, name in zip(traced.inputs, stage.reads, strict=True)
        }
        for local, inner in traced.parameters.items():
            name = stage.scope + local
            mapping[inner] = parameters[name] = ir.Value(
                name=name, shape=inner.shape, type=inner.type
            )
        for inner in _constants_of(traced):
            mapping[inner] = _shared_constant(inner, constants)
        prefix = f"{stage.scope}{type(stage.piece.module).__name__}/"
        nodes.extend(_repeat(traced.nodes, mapping, prefix))
        for inner, name in zip(traced.outputs, stage.writes, strict=True):
            values[name] = mapping[inner]
    outputs = [_named(values[spec.name], spec) for spec in chain.outputs]
    graph = ir.Graph(
        inputs=[*(values[spec.name] for spec in chain.inputs), *parameters.values()],
        outputs=outputs,
        nodes=nodes,
        initializers=list(constants.values()),
        opset_imports={"": OPSET},
        name=chain.component,
    )
    model = ir.Model(graph, ir_version=10, producer_name="fluxdeploy")
    drop_round_trips(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    return model


def _constants_of(traced: _Traced) -> list[ir.Value]:
    """The initializers that a piece's nodes read, or that it gives out as they are."""
    read = [value for node in traced.nodes for value in node.inputs if value is not None]
    found = (value for value in (*read, *traced.outputs) if value.is_initializer())
    return list(dict.fromkeys(found))


def _boundary(spec: TensorSpec) -> ir.Value:
    return ir.Value(
        name=spec.name,
        shape=ir.Shape(spec.shape),
        type=ir.TensorType(_DTYPES[spec.dtype]),
    )


def _named(value: ir.Value, spec: TensorSpec) -> ir.Value:
    value.name = spec.name
    value.shape = ir.Shape(spec.shape)
    value.type = ir.TensorType(_DTYPES[spec.dtype])
    return value


def _shared_constant(value: ir.Value, constants: dict[tuple[object, ...], ir.Value]) -> ir.Value:
    """One initializer for equal constants: every repeated block brings the same few."""
    tensor = value.const_value
    assert tensor is not None
    array = tensor.numpy()
    key = (tensor.dtype, array.shape, array.tobytes())
    if key not in constants:
        name = f"constant.{len(constants)}"
        constants[key] = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=ir.Tensor(array, dtype=tensor.dtype, name=name),
        )
    return constants[key]


def _repeat(
    nodes: Iterable[ir.Node], mapping: dict[ir.Value, ir.Value], prefix: str
) -> Iterator[ir.Node]:
    """Copies of nodes over the mapped values; extends `mapping` by their outputs."""
    for node in nodes:
        outputs = [
            ir.Value(name=f"{prefix}{output.name}", type=output.type) for output in node.outputs
        ]
        mapping.update(zip(node.outputs, outputs, strict=True))
        yield ir.Node(
            node.domain,
            node.op_type,
            inputs=[None if value is None else mapping[value] for value in node.inputs],
            attributes=_copied(node.attributes),
            outputs=outputs,
            name=prefix + (node.name or str(node.outputs[0].name)).removeprefix("node_"),
        )


def _copied(attributes: Mapping[str, ir.Attr]) -> list[ir.Attr]:
    return [ir.Attr(a.name, a.type, a.value) for a in attributes.values()]
