"""Attention and RoPE as ONNX Runtime's own operators.

The standard form of attention writes the scores [heads, tokens, tokens] to memory, 2 GB for a block
of FLUX.1 at 1024x1024, and their softmax as much again. `MultiHeadAttention` computes them in tiles
that stay in the cache (T. Dao and others, "FlashAttention", 2022). It takes Q, K and V with all
heads side by side, as the linears leave them, and so does `RotaryEmbedding`: the transpositions go
too. RoPE stays in float32, whatever type the products have.

LayerNorm and GELU need nothing here: ONNX Runtime merges them when it opens a graph. RMSNorm in
float32 neither, but one that begins with a cast from bfloat16 it merges to an operator for which it
has no kernel. In 16 bits RMSNorm is therefore ONNX's own operator, of opset 23.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["fuse_attention"]

_Insert = Callable[[ir.Node], None]

_DOMAIN = "com.microsoft"
_HEADS_FIRST = (0, 2, 1, 3)
_HEADS_FIRST_TURNED = (0, 2, 3, 1)
_LAST_TURNED = (0, 1, 3, 2)


def fuse_attention(model: ir.Model) -> None:
    """Rewrite every softmax(scale · Q Kᵀ) V whose Q and K are rotated.

    Attention in another form, with Q/DQ around its products or with a bias, stays as it is.
    """
    fusion = _Fusion(model.graph)
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    kinds = {fusion.fuse(softmax) for softmax in softmaxes} - {None}
    if not kinds:
        return
    model.graph.opset_imports[_DOMAIN] = 1
    if kinds - {ir.DataType.FLOAT}:
        model.graph.opset_imports[""] = 23
        for node in [node for node in model.graph if node.op_type == "Div"]:
            fusion.merge_norm(node)
    RemoveUnusedNodesPass()(model)


@dataclass(frozen=True)
class _Rotation:
    """A RoPE: `x` [B,T,heads,head_dim], and its tables [T,head_dim]."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    heads: int


@dataclass
class _Fusion:
    graph: ir.Graph
    # Half tables by the whole ones: all blocks read the same two.
    tables: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def fuse(self, softmax: ir.Node) -> ir.DataType | None:
        """Rewrite the attention around a softmax, if it has the form for it; returns its type."""
        scores = _made_by(_before_cast(softmax.inputs[0]), "MatMul")
        mixed = _read_by(_after_cast(softmax.outputs[0]), "MatMul")
        if scores is None or mixed is None:
            return None
        scaled = _made_by(_before_cast(scores.inputs[0]), "Mul")
        merged = _read_by(mixed.outputs[0], "Transpose")
        flat = None if merged is None else _read_by(merged.outputs[0], "Reshape")
        scale = None if scaled is None else _number(scaled.inputs[1])
        if scaled is None or flat is None or scale is None:
            return None
        query = _rotation(_turned(scaled.inputs[0], _HEADS_FIRST))
        key = _rotation(_key(scores.inputs[1]))
        value = _turned(mixed.inputs[1], _HEADS_FIRST)
        kind = None if value is None else value.dtype
        if query is None or key is None or value is None or kind is None:
            return None
        name = str(flat.outputs[0].name)
        inputs = [
            self._rotated(query, kind, flat.prepend, f"{name}.query"),
            self._rotated(key, kind, flat.prepend, f"{name}.key"),
            self._side_by_side(value, kind, flat.prepend, f"{name}.value"),
        ]
        attributes = [ir.AttrInt64("num_heads", query.heads), ir.AttrFloat32("scale", scale)]
        fused = self._node(
            flat.prepend, "MultiHeadAttention", inputs, name, attributes, _DOMAIN, kind
        )
        ir.convenience.replace_all_uses_with(flat.outputs[0], fused)
        return kind

    def merge_norm(self, division: ir.Node) -> None:
        """Rewrite x / sqrt(mean(x²) + ε) · weight, if a division belongs to that."""
        x, root = division.inputs[0], _made_by(division.inputs[1], "Sqrt")
        total = None if root is None else _made_by(root.inputs[0], "Add")
        mean = None if total is None else _made_by(total.inputs[0], "ReduceMean")
        square = None if mean is None else _made_by(mean.inputs[0], "Pow")
        weighted = _read_by(division.outputs[0], "Mul")
        epsilon = None if total is None else _number(total.inputs[1])
        if square is None or square.inputs[0] is not x or weighted is None or epsilon is None:
            return
        inputs = [x, weighted.inputs[1]]
        attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", epsilon)]
        name = str(weighted.outputs[0].name)
        merged = self._node(weighted.prepend, "RMSNormalization", inputs, name, attributes)
        ir.convenience.replace_all_uses_with(weighted.outputs[0], merged)

    def _rotated(
        self, rotation: _Rotation, kind: ir.DataType, insert: _Insert, name: str
    ) -> ir.Value:
        inputs = [
            self._side_by_side(rotation.x, ir.DataType.FLOAT, insert, f"{name}.flat"),
            self._every_position(),
            self._half_table(rotation.cos),
            self._half_table(rotation.sin),
        ]
        interleaved = [ir.AttrInt64("interleaved", 1)]
        rotated = self._node(insert, "RotaryEmbedding", inputs, name, interleaved, _DOMAIN)
        if kind == ir.DataType.FLOAT:
            return rotated
        return self._node(insert, "Cast", [rotated], name, [ir.AttrInt64("to", kind)], kind=kind)

    def _side_by_side(
        self, value: ir.Value, kind: ir.DataType, insert: _Insert, name: str
    ) -> ir.Value:
        """[B,T,heads,head_dim] to [B,T,D]."""
        shape = self._constant("side_by_side.shape", [0, 0, -1])
        return self._node(insert, "Reshape", [value, shape], name, kind=kind)

    def _half_table(self, table: ir.Value) -> ir.Value:
        """A table with one column for each pair of channels: both of a pair have the same angle."""
        if table not in self.tables:
            bounds = [
                self._constant(f"half_table.{name}", [number])
                for name, number in (
                    ("starts", 0),
                    ("ends", np.iinfo(np.int64).max),
                    ("axes", 1),
                    ("steps", 2),
                )
            ]
            # As early as can be, since every block reads it.
            made = table.producer()
            insert = self.graph[0].prepend if made is None else made.append
            name = f"{table.name}.half"
            self.tables[table] = self._node(insert, "Slice", [table, *bounds], name)
        return self.tables[table]

    def _every_position(self) -> ir.Value:
        """Token t has row t of the tables: an offset of 0."""
        return self._constant("rope.first_position", [0])

    def _constant(self, name: str, numbers: Sequence[int]) -> ir.Value:
        if name not in self.graph.initializers:
            value = ir.Value(
                name=name,
                shape=ir.Shape((len(numbers),)),
                type=ir.TensorType(ir.DataType.INT64),
                const_value=ir.tensor(np.array(numbers, np.int64), name=name),
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _node(
        self,
        insert: _Insert,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Sequence[ir.Attr] = (),
        domain: str = "",
        kind: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        value = ir.Value(name=f"{name}/{op_type}", type=ir.TensorType(kind))
        insert(ir.Node(domain, op_type, inputs, attributes, outputs=[value], name=value.name))
        return value


def _rotation(value: ir.Value | None) -> _Rotation | None:
    """x · cos + (−b, a of each pair of x) · sin, as `mmdit.rotate` has it."""
    total = _made_by(value, "Add")
    parts = [] if total is None else [_made_by(part, "Mul") for part in total.inputs]
    if len(parts) != 2 or parts[0] is None or parts[1] is None:
        return None
    (x, cos), (turned, sin) = parts[0].inputs, parts[1].inputs
    flat = _made_by(turned, "Reshape")
    joined = None if flat is None else _made_by(flat.inputs[0], "Concat")
    heads = None if flat is None else _target(flat)[2:3]
    tables = [_table(cos), _table(sin)]
    if x is None or joined is None or not heads or tables[0] is None or tables[1] is None:
        return None
    return _Rotation(x, tables[0], tables[1], heads[0])


def _table(value: ir.Value | None) -> ir.Value | None:
    """The table [T,head_dim] that [T,1,head_dim] was made from."""
    node = _made_by(value, "Unsqueeze", shared=True)
    return None if node is None else node.inputs[0]


def _turned(value: ir.Value | None, permutation: Sequence[int]) -> ir.Value | None:
    """What a transposition takes, if it is this one."""
    node = _made_by(value, "Transpose", shared=True)
    if node is None or tuple(node.attributes["perm"].as_ints()) != tuple(permutation):
        return None
    return node.inputs[0]


def _key(value: ir.Value | None) -> ir.Value | None:
    """K [B,T,heads,head_dim] where Q's product takes [B,heads,head_dim,T].

    In float32 both transpositions are one; in 16 bits there is the cast between them.
    """
    rounded = _turned(value, _LAST_TURNED)
    if rounded is None:
        return _turned(value, _HEADS_FIRST_TURNED)
    return _turned(_before_cast(rounded), _HEADS_FIRST)


def _before_cast(value: ir.Value | None) -> ir.Value | None:
    """What a cast takes that made a value, or the value itself."""
    cast = _made_by(value, "Cast")
    return value if cast is None else cast.inputs[0]


def _after_cast(value: ir.Value) -> ir.Value:
    """What a cast makes of a value, or the value itself."""
    cast = _read_by(value, "Cast")
    return value if cast is None else cast.outputs[0]


def _made_by(value: ir.Value | None, op_type: str, shared: bool = False) -> ir.Node | None:
    """The node that makes a value, if it is of a kind, for one reader unless `shared`."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != op_type:
        return None
    return node if shared or len(list(value.uses())) == 1 else None


def _read_by(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads a value, if it is of a kind."""
    readers = [node for node, _ in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None


def _number(value: ir.Value | None) -> float | None:
    """A constant scalar."""
    tensor = None if value is None else value.const_value
    return float(tensor.numpy()) if tensor is not None and tensor.size == 1 else None


def _target(reshape: ir.Node) -> list[int]:
    """The constant shape that a Reshape gives, [] where it is none."""
    shape = reshape.inputs[1]
    tensor = None if shape is None else shape.const_value
    return [] if tensor is None else [int(size) for size in tensor.numpy()]
