"""Tracing: a chain becomes one ONNX graph, each distinct piece traced once.

Parameters stay on the meta device and enter a traced piece as inputs, so that no optimization
tries to read or fold them. `exporters.bind` turns them into external data.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import optimize_ir

from exporters.chain import Chain, Piece
from exporters.simplify import drop_round_trips, simplify_shapes
from fluxdeploy.bundle.manifest import TensorSpec
from fluxdeploy.errors import ExportError

__all__ = ["OPSET", "trace_chain"]

OPSET = 22
"""ONNX opset 22: the first whose Conv takes bfloat16, and in every current runtime."""

# Sizes to trace with: no two alike and none of them 1, since torch would take a size of 1 for a
# constant and equal sizes for the same symbol. T = S + L; H and W are whole VAE strides.
_EXAMPLE = {"B": 2, "S": 5, "L": 7, "T": 12, "N": 3, "h": 6, "w": 10, "H": 48, "W": 80}

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


def _trace_piece(piece: Piece) -> ir.Graph:
    """The ONNX graph of one piece; its parameters are the last inputs, in their own order."""
    arguments = tuple(
        torch.empty(value.size(_EXAMPLE), dtype=value.dtype, device="meta")
        for value in piece.inputs
    )
    dynamic: tuple[Any, ...] = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, d in enumerate(v.shape) if isinstance(d, str)}
        for v in piece.inputs
    )
    if _takes_many(piece):
        dynamic = (dynamic,)
    try:
        with _quiet(), torch.device("meta"), torch.no_grad():
            program = torch.onnx.export(
                torch.export.export(piece.module, arguments, dynamic_shapes=dynamic, strict=False),
                dynamo=True,
                optimize=False,
                verify=False,
                verbose=False,
                opset_version=OPSET,
            )
    except Exception as error:
        kind = type(piece.module).__name__
        raise ExportError(f"{kind} could not be traced to ONNX: {error}") from error
    assert program is not None
    model = program.model
    graph = model.graph
    for name, _ in piece.module.named_parameters():
        value = graph.initializers.pop(name, None)
        if value is None:
            kind = type(piece.module).__name__
            raise ExportError(f"Parameter {name} of {kind} is not used by its own graph.")
        value.const_value = None
        graph.inputs.append(value)
    with _quiet():
        optimize_ir(model)
        simplify_shapes(model)
        CommonSubexpressionEliminationPass()(model)
        IdentityEliminationPass()(model)
        RemoveUnusedNodesPass()(model)
    return graph


def _takes_many(piece: Piece) -> bool:
    """Whether the module's forward takes its inputs as *args: torch then nests their shapes."""
    parameters = inspect.signature(piece.module.forward).parameters.values()
    return any(p.kind is p.VAR_POSITIONAL for p in parameters)


def trace_chain(chain: Chain, on_piece: Callable[[], None] = lambda: None) -> ir.Model:
    """The chain as one ONNX model whose weights are inputs named as in the checkpoint.

    The first inputs are the chain's own. `on_piece` is called after every traced piece.
    Raises `ExportError` where torch cannot trace a piece or a stage does not fit the next.
    """
    values = {spec.name: _boundary(spec) for spec in chain.inputs}
    parameters: dict[str, ir.Value] = {}
    constants: dict[tuple[object, ...], ir.Value] = {}
    nodes: list[ir.Node] = []
    traced: dict[Piece, ir.Graph] = {}
    for stage in chain.stages:
        if stage.piece not in traced:
            traced[stage.piece] = _trace_piece(stage.piece)
            on_piece()
        graph = traced[stage.piece]
        mapping: dict[ir.Value, ir.Value] = {}
        for inner, name in zip(graph.inputs, stage.reads, strict=False):
            mapping[inner] = values[name]
        for inner in graph.inputs[len(stage.reads) :]:
            name = stage.scope + str(inner.name)
            mapping[inner] = parameters[name] = ir.Value(
                name=name, shape=inner.shape, type=inner.type
            )
        for inner in graph.initializers.values():
            mapping[inner] = _shared_constant(inner, constants)
        prefix = f"{stage.scope}{type(stage.piece.module).__name__}/"
        nodes.extend(_repeat(graph, mapping, prefix))
        for inner, name in zip(graph.outputs, stage.writes, strict=True):
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


def _repeat(graph: ir.Graph, mapping: dict[ir.Value, ir.Value], prefix: str) -> Iterator[ir.Node]:
    """Copies of the graph's nodes over the mapped values; extends `mapping` by their outputs."""
    for node in graph:
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
