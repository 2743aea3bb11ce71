"""Attention and RoPE as ONNX Runtime's own operators.

The standard form of attention writes the scores [heads, tokens, tokens] to memory, 2 GB for a block
of FLUX.1 at 1024x1024, and their softmax as much again. `MultiHeadAttention` computes them in tiles
that stay in the cache (T. Dao and others, "FlashAttention", 2022). It takes Q, K and V with all
heads side by side, as the linears leave them, and so does `RotaryEmbedding`: the transpositions go
too. RoPE stays in float32, whatever type the products have; `narrow.py` changes that for GPUs.

The VAE's attention has one head as wide as the network, and no RoPE. Its scores are the largest
tensors of all, 16 GiB for a picture of 2048x2048.

LayerNorm and GELU need nothing here: ONNX Runtime merges them when it opens a graph. RMSNorm in
float32 neither, but one that begins with a cast from bfloat16 it merges to an operator for which it
has no kernel. In 16 bits RMSNorm is therefore ONNX's own operator, of opset 23.

What is replaced stands here as patterns: functions over `op`, as onnxscript's rewriter takes them.
It leaves a subgraph alone where something else reads a value inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter.pattern import ANY_VALUE, RewriteRule, RewriteRuleSet

__all__ = ["fuse_attention"]

_DOMAIN = "com.microsoft"
_FLOAT = ir.DataType.FLOAT
_HEADS_FIRST = (0, 2, 1, 3)


def fuse_attention(model: ir.Model) -> None:
    """Rewrite every softmax(scale · Q Kᵀ) V whose Q and K are rotated, or that has one head.

    Attention in another form, with Q/DQ around its products or with a bias, stays as it is.
    """
    fusion = _Fusion(model.graph)
    forms = (_attention_in_float32, _attention_in_16_bits)
    RewriteRuleSet([RewriteRule(form, fusion.attention) for form in forms]).apply_to_model(model)
    found = RewriteRuleSet([RewriteRule(_one_head, fusion.one_head)]).apply_to_model(model)
    if not fusion.kinds and not found:
        return
    if fusion.kinds - {_FLOAT}:
        model.graph.opset_imports[""] = 23
        RewriteRuleSet([RewriteRule(_rms_norm, fusion.rms_norm)]).apply_to_model(model)
    RemoveUnusedNodesPass()(model)


def _attention_in_float32(
    op: Any, query: Any, key: Any, value: Any, cos: Any, sin: Any, pairs: Any, scale: Any
) -> Any:
    """softmax(scale · Q Kᵀ) V of Q, K, V [B,T,heads,head_dim], to [B,T,D]."""
    q = op.Transpose(_rotated(op, query, cos, sin, pairs), perm=_HEADS_FIRST)
    k = op.Transpose(_rotated(op, key, cos, sin, pairs), perm=(0, 2, 3, 1))
    weights = op.Softmax(op.MatMul(q * scale, k), axis=-1)
    return _mixed(op, weights, value)


def _attention_in_16_bits(
    op: Any, query: Any, key: Any, value: Any, cos: Any, sin: Any, pairs: Any, scale: Any, kind: Any
) -> Any:
    """The same with products in 16 bits, and RoPE, scaling and softmax in float32."""
    q = op.Transpose(_rotated(op, query, cos, sin, pairs), perm=_HEADS_FIRST)
    k = op.Transpose(_rotated(op, key, cos, sin, pairs), perm=_HEADS_FIRST)
    turned = op.Transpose(op.Cast(k, to=kind), perm=(0, 1, 3, 2))
    scores = op.Cast(op.MatMul(op.Cast(q * scale, to=kind), turned), to=_FLOAT)
    weights = op.Cast(op.Softmax(scores, axis=-1), to=kind)
    return _mixed(op, weights, value)


def _one_head(op: Any, query: Any, key: Any, value: Any, scale: Any, head: Any) -> Any:
    """softmax(scale · Q Kᵀ) V of Q, K, V [B,1,T,D] in float32, to [B,T,D]."""
    scores = op.MatMul(query * scale, op.Transpose(key, perm=(0, 1, 3, 2)))
    mixed = op.MatMul(op.Softmax(scores, axis=-1), value)
    return op.Gather(mixed, head, axis=1, _outputs=["replaced"])


def _rotated(op: Any, x: Any, cos: Any, sin: Any, pairs: Any) -> Any:
    """x · cos + (−b, a of each pair of x) · sin, as `mmdit.rotate` has it."""
    a, b = op.Split(op.Reshape(x, pairs), axis=4, num_outputs=2, _outputs=2)
    turned = op.Reshape(op.Concat(op.Neg(b), a, axis=-1), ANY_VALUE)
    return x * cos + turned * sin


def _mixed(op: Any, weights: Any, value: Any) -> Any:
    mixed = op.MatMul(weights, op.Transpose(value, perm=_HEADS_FIRST))
    return op.Reshape(op.Transpose(mixed, perm=_HEADS_FIRST), ANY_VALUE, _outputs=["replaced"])


def _rms_norm(op: Any, x: Any, weight: Any, epsilon: Any) -> Any:
    """x / sqrt(mean(x²) + ε) · weight"""
    root = op.Sqrt(op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1) + epsilon)
    return op.Mul(x / root, weight, _outputs=["replaced"])


@dataclass
class _Fusion:
    """What takes the place of a match; None, and nothing changes, where its constants do not fit.

    kinds: the types that attentions were found in.
    tables: half tables by the whole ones, since all blocks read the same two.
    """

    graph: ir.Graph
    kinds: set[ir.DataType] = field(default_factory=set)
    tables: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def attention(
        self,
        op: Any,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        pairs: ir.Value,
        scale: ir.Value,
        replaced: ir.Value,
        **_: ir.Attr,
    ) -> ir.Value | None:
        """Q, K and V with their heads side by side, RoPE in float32, attention in V's type."""
        shape, number, kind = _numbers(pairs), _numbers(scale), value.dtype
        tables = [_before_unsqueeze(cos), _before_unsqueeze(sin)]
        if shape[4:] != [2] or len(number) != 1 or None in tables or kind is None:
            return None
        self.kinds.add(kind)
        name = str(replaced.name)
        flat = self._constant("side_by_side.shape", [0, 0, -1])
        # Token t has row t of the tables: an offset of 0.
        rows = [self._constant("rope.first_position", [0])]
        rows += [self._half_table(table) for table in tables if table is not None]
        inputs = []
        for part, x in ((f"{name}.query", query), (f"{name}.key", key)):
            x = _made(op, "Reshape", [x, flat], f"{part}.flat")
            x = _made(op, "RotaryEmbedding", [x, *rows], part, _DOMAIN, interleaved=1)
            inputs.append(x if kind == _FLOAT else _made(op, "Cast", [x], part, kind=kind, to=kind))
        inputs.append(_made(op, "Reshape", [value, flat], f"{name}.value", kind=kind))
        attributes = {"num_heads": shape[2], "scale": number[0]}
        return _instead(
            replaced, _made(op, "MultiHeadAttention", inputs, name, _DOMAIN, kind, **attributes)
        )

    def one_head(
        self,
        op: Any,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        scale: ir.Value,
        head: ir.Value,
        replaced: ir.Value,
    ) -> ir.Value | None:
        number = _numbers(scale)
        if _numbers(head) != [0] or len(number) != 1 or value.dtype != _FLOAT:
            return None
        name = str(replaced.name)
        axis = self._constant("one_head.axis", [1])
        inputs = [
            _made(op, "Squeeze", [x, axis], f"{name}.{part}")
            for part, x in (("query", query), ("key", key), ("value", value))
        ]
        attributes = {"num_heads": 1, "scale": number[0]}
        return _instead(
            replaced, _made(op, "MultiHeadAttention", inputs, name, _DOMAIN, **attributes)
        )

    def rms_norm(
        self, op: Any, x: ir.Value, weight: ir.Value, epsilon: ir.Value, replaced: ir.Value
    ) -> ir.Value | None:
        number = _numbers(epsilon)
        if len(number) != 1:
            return None
        attributes = {"axis": -1, "epsilon": number[0]}
        name = str(replaced.name)
        return _instead(replaced, _made(op, "RMSNormalization", [x, weight], name, **attributes))

    def _half_table(self, table: ir.Value) -> ir.Value:
        """A table with one column for each pair of channels: both of a pair have the same angle."""
        if table not in self.tables:
            bounds = {"starts": 0, "ends": np.iinfo(np.int64).max, "axes": 1, "steps": 2}
            inputs = [self._constant(f"half_table.{key}", [n]) for key, n in bounds.items()]
            half = ir.Value(name=f"{table.name}.half/Slice", type=ir.TensorType(_FLOAT))
            node = ir.node("Slice", [table, *inputs], outputs=[half], name=half.name)
            # As early as can be, since every block reads it.
            maker = table.producer()
            insert = self.graph[0].prepend if maker is None else maker.append
            insert(node)
            self.tables[table] = half
        return self.tables[table]

    def _constant(self, name: str, numbers: Sequence[int]) -> ir.Value:
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.array(numbers, np.int64), name=name)
            self.graph.register_initializer(ir.val(name, const_value=tensor))
        return self.graph.initializers[name]


def _made(
    op: Any,
    op_type: str,
    inputs: Sequence[ir.Value],
    name: str,
    domain: str = "",
    kind: ir.DataType = _FLOAT,
    **attributes: int | float,
) -> ir.Value:
    """What a new node makes of its inputs."""
    full = f"{name}/{op_type}"
    made: ir.Value = getattr(op, op_type)(*inputs, _domain=domain, _outputs=[full], **attributes)
    made.type = ir.TensorType(kind)
    node = made.producer()
    assert node is not None
    node.name = full
    return made


def _instead(replaced: ir.Value, made: ir.Value) -> ir.Value:
    """A value under its own name, but for outputs: the rewriter gives it that of the replaced."""
    if not replaced.is_graph_output():
        replaced.name = made.name
    return made


def _before_unsqueeze(value: ir.Value) -> ir.Value | None:
    """The table [T,head_dim] that [T,1,head_dim] was made from.

    That step is in no pattern, since all blocks share it.
    """
    node = value.producer()
    if node is None or node.op_type != "Unsqueeze" or _numbers(node.inputs[1]) != [1]:
        return None
    return node.inputs[0]


def _numbers(value: ir.Value | None) -> list[Any]:
    """The numbers of a constant, [] of another value."""
    tensor = None if value is None else value.const_value
    return [] if tensor is None else list(tensor.numpy().ravel().tolist())
